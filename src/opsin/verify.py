"""Proof that a recipe resumes exactly: one straight run, one killed and resumed, equal bytes."""

import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from opsin.errors import ConfigError, TrainingError


def verify(recipe: str, overrides: Sequence[str], *, steps: int, kills: int) -> int:
    """Train `steps` steps twice, the second time killed with SIGKILL `kills` times; 0 when equal.

    The kills fall at random moments between the first checkpoint and the usual end of the run, so
    they also hit checkpoint writes. Prints both hashes of model.safetensors.

    Raises:
        ConfigError: steps or kills below 1.
        TrainingError: a run failed by itself.
    """
    if steps < 1 or kills < 1:
        raise ConfigError(f"command line: --steps {steps} --kills {kills}: both must be at least 1")
    own = [*overrides, f"limits.steps={steps}", "log.tensorboard=false"]
    if not any(text.startswith("checkpoints.every=") for text in overrides):
        own.append(f"checkpoints.every={max(1, steps // 10)} steps")
    with tempfile.TemporaryDirectory(prefix="opsin-verify-") as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        command = [sys.executable, "-m", "opsin", "train", recipe, *own, "--quiet", "--out"]
        start_s, whole_s = _time_straight_run([*command, str(straight)], straight)
        for number in range(1, kills + 1):
            moment_s = random.uniform(start_s, whole_s)
            died = _run_and_kill([*command, str(killed)], moment_s)
            newest = max((p.name for p in (killed / "checkpoints").glob("step-*")), default="no checkpoint yet")
            print(
                f"kill {number}: after {moment_s:.1f} s, {newest}" if died else f"kill {number}: it had ended",
                flush=True,
            )
        _wait([*command, str(killed)])
        first, second = (_hash(folder / "model.safetensors") for folder in (straight, killed))
    print(f"straight            {first}")
    print(f"killed and resumed  {second}")
    print("equal" if first == second else "DIFFERENT: this recipe does not resume exactly on this machine")
    return 0 if first == second else 4


def _time_straight_run(command: Sequence[str], out: Path) -> tuple[float, float]:
    """Seconds until the first checkpoint, and until the end."""
    began = time.monotonic()
    process = subprocess.Popen(command)
    start_s = 0.0
    while process.poll() is None:
        if not start_s and any(out.glob("checkpoints/step-*")):
            start_s = time.monotonic() - began
        time.sleep(0.02)
    if process.returncode:
        raise TrainingError(f"the straight run ended with exit status {process.returncode}")
    return start_s, time.monotonic() - began


def _run_and_kill(command: Sequence[str], after_s: float) -> bool:
    """Whether the run was still going on when the kill came."""
    process = subprocess.Popen(command)
    try:
        status = process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    if status:
        raise TrainingError(f"the killed run ended by itself with exit status {status}")
    return False


def _wait(command: Sequence[str]) -> None:
    status = subprocess.run(command, check=False).returncode
    if status:
        raise TrainingError(f"the resumed run ended with exit status {status}")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
