"""`optim.lr=auto`: the learning rate that `opsin tune lr` suggests, from a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from opsin.errors import ConfigError, OpsinError, Stopped, TrainingError, TransientError
from opsin.processes.trail import VARIABLE, follow
from opsin.run.recipe import Recipe, read
from opsin.settings.text import flatten

RESULT = "lr.json"

# Keys that no sweep sees: it has its own rate, keeps nothing and scores nothing.
_UNSEEN = (
    "optim.lr",
    "optim.schedule.",
    "data.workers",
    "data.prefetch",
    "data.resident",
    "checkpoints.",
    "limits.",
    "log.",
    "monitors.",
    "evaluators.",
)
_KINDS: Mapping[int, type[OpsinError]] = {2: ConfigError, 3: Stopped}


def find_lr(
    recipe: Path, overrides: Sequence[str], folder: Path, *, say: Callable[[str], None] = lambda text: None
) -> Mapping[str, float]:
    """The learning rates for `recipe` with its overrides: `lr`, and each other one that goes along with it.

    They take the place of the same fields of `recipe.optim`. `folder` keeps what the sweep wrote; a later call for
    the same recipe reads it there.

    Raises:
        ConfigError: the recipe cannot be trained as it is.
        Stopped: the sweep got a signal.
        TrainingError: its curve has no usable slope, or it found another reason that stays.
        TransientError: it crashed.
    """
    known = _read_result(folder, sweep_key(read(str(recipe), overrides)))
    if known is not None:
        say(f"optim.lr=auto: {_shown(known)}, found before ({folder})")
        return known
    say(f"optim.lr=auto: sweeping the learning rate first ({folder})")
    command = [sys.executable, "-m", "opsin", "tune", "lr", str(recipe), *overrides, "--quiet", "--out", str(folder)]
    # With a trail of its own: where the sweep is, is no place of the run.
    with tempfile.TemporaryDirectory(prefix="opsin-lr-", ignore_cleanup_errors=True) as trail:
        done = subprocess.run(
            command, env=_environment(trail), stderr=subprocess.PIPE, text=True, errors="replace", check=False
        )
        is_verdict = follow(Path(trail)).verdict is not None
    if done.returncode:
        faults = [line.removeprefix("opsin: ") for line in done.stderr.splitlines() if line.startswith("opsin: ")]
        faults = faults or [f"the sweep ended with exit status {done.returncode}: {done.stderr.strip()[-500:]}"]
        kind = _KINDS.get(done.returncode, TrainingError if is_verdict else TransientError)
        raise kind(*(f"optim.lr=auto: {fault}" for fault in faults))
    found = _read_result(folder, sweep_key(read(str(recipe), overrides)))
    assert found is not None, "the sweep has written what it found"
    say(f"optim.lr=auto: {_shown(found)}")
    return found


def sweep_key(recipe: Recipe) -> str:
    """A short hash of what a sweep depends on; recipes with the same one get the same learning rate."""
    seen = {key: value for key, value in flatten(recipe).items() if not key.startswith(_UNSEEN)}
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def _environment(trail: str) -> dict[str, str]:
    """The environment of a process that finds this very package, however this process came to it."""
    places = [str(Path(__file__).resolve().parent.parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), VARIABLE: trail}


def _read_result(folder: Path, key: str) -> Mapping[str, float] | None:
    """What an earlier sweep found, if it was of this recipe and found something."""
    try:
        result = json.loads((folder / RESULT).read_text())
        if result["key"] != key or not result["rates"]:
            return None
        return {str(name): float(rate) for name, rate in result["rates"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or damaged: it is made anew
        return None


def _shown(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={rate:g}" for name, rate in rates.items())
