"""Proof that runs of an older commit end in the same bytes when the code of this checkout resumes them.

    python benchmarks/resume_across_commits.py COMMIT [--keep FOLDER | --runs FOLDER] [--only RUN]

The code of COMMIT, in a checkout of its own, trains small runs on the bundled digits and is stopped or killed half-way.
That code resumes one copy of each run, the code of this checkout another. Both must end with the same weights, the same
last checkpoint and the same metrics.jsonl apart from times, throughput and memory; otherwise the exit status is 1.

`--keep FOLDER` leaves each half-done run in FOLDER/RUN/half and the run that COMMIT finished in FOLDER/RUN/old.
`--runs FOLDER` takes both from there, so that only the code of this checkout trains. Other processors and other
versions of torch round differently, so kept runs are valid on the machine that made them.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
EVERYWHERE = "data.workers=0 device=cpu precision=fp32 log.every=1 log.tensorboard=false log.plots=false"
OF_THE_MACHINE = ("time_s", "time/", "train/images_per_s", "system/", "gpu/")
"""Prefixes of the names of values that no two runs have in common."""


class Failed(Exception):
    """A run cannot be compared."""


@dataclass(frozen=True, slots=True)
class Half:
    """A run that is ended in the middle."""

    name: str
    command: str
    """The recipe and its keys."""
    between: tuple[int, int]
    """The range of steps for its newest checkpoint; the run is ended in the middle of it."""
    end: Signals = SIGTERM
    rolls_back: bool = False
    """True if it must have rolled back before it is ended."""


HALVES = (
    Half(
        "supervised-stages",
        """quickstart model.name=convnet model.widths=[8,16,16] data.image_size=16 epochs=null ema.decay=0.9
        'stages=[{epochs: 2, image_size: 10, batch_size: 96, data_fraction: 0.5},
            {epochs: 2, image_size: 12, batch_size: 64, train: [head.*]}, {epochs: 2, batch_size: 128, lr_scale: 0.5}]'
        'optim.schedule={name: onecycle, momentum: [0.95, 0.85]}' optim.layer_decay=0.8
        'evaluators.val.every=1 epoch' 'checkpoints.every=1 epoch'""",
        between=(15, 57),  # the second stage
    ),
    Half(
        "dino",
        """dino-digits model.widths=[8,16,16] method.prototypes=64 method.hidden=32 method.bottleneck=16 epochs=4
        'evaluators.knn.every=2 epochs' evaluators.linear=null 'checkpoints.every=1 epoch'""",
        between=(44, 87),
    ),
    Half(
        "hjepa-rollback",
        # The noise of the loss exceeds this narrow band several times in each half.
        """hjepa-digits model.width=16 model.depth=2 model.heads=2 method.predictor_width=16 method.predictor_depth=1
        batch_size=32 epochs=5 'evaluators.knn.every=2 epochs' evaluators.linear=null evaluators.maps=null
        monitors.loss.action=rollback monitors.loss.patience=1 monitors.loss.factor=1 monitors.loss.floor=0.001
        guard.max_rollbacks=100 'guard.margin=5 steps' 'guard.lr_for=10 steps' 'checkpoints.every=20 steps'""",
        between=(100, 210),
        rolls_back=True,
    ),
    Half(
        "mixed-killed",
        """quickstart model.width=16 model.depth=2 model.heads=2 model.drop_path=0.2 accumulate=2 epochs=6
        'method.mix={mixup: 0.4, cutmix: 1.0, until: 0.9}' 'checkpoints.every=15 steps'""",
        between=(60, 110),
        end=SIGKILL,
    ),
)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def python(code: Path, *arguments: str, messages: Path) -> "subprocess.Popen[bytes]":
    """A process with the code of a checkout; run.json records the commit of its working directory."""
    own = {**os.environ, "PYTHONPATH": str(code / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with messages.open("wb") as file:
        return subprocess.Popen([sys.executable, *arguments], cwd=code, env=own, stdout=file, stderr=file)


def check_import(code: Path, messages: Path) -> None:
    """Check that processes import the package of the checkout."""
    python(code, "-c", "import opsin; print(opsin.__file__)", messages=messages).wait()
    if not messages.read_text().startswith(str(code / "src")):
        raise SystemExit(f"{code}: Python imports another opsin: {messages.read_text()}")


def begin(run: Half, out: Path, code: Path) -> None:
    """Train the first half of a run."""
    arguments = ("-m", "opsin", "train", *shlex.split(f"{run.command} {EVERYWHERE}"), "--quiet", "--out", str(out))
    with python(code, *arguments, messages=out.with_suffix(".messages")) as process:
        try:
            while process.poll() is None and not is_half_done(run, out):
                time.sleep(0.005)
            process.send_signal(run.end)
            status = process.wait()
        finally:
            process.kill()
    if status != (-SIGKILL if run.end is SIGKILL else 3):
        raise Failed(f"ended with status {status}: {out.with_suffix('.messages').read_text()}")


def is_half_done(run: Half, out: Path) -> bool:
    """True once the run is to be ended."""
    if run.rolls_back and all(event["kind"] != "rollback" for event in lines(out / "events.jsonl")):
        return False
    return any(row["step"] >= sum(run.between) / 2 for row in lines(out / "metrics.jsonl"))


def resume(half: Path, copy: Path, code: Path) -> None:
    """Train a copy of a half-done run to its end."""
    shutil.copytree(half, copy, symlinks=True)
    messages = copy.with_suffix(".messages")
    if status := python(code, "-m", "opsin", "resume", str(copy), "--quiet", messages=messages).wait():
        raise Failed(f"opsin resume of {code} ended with status {status}: {messages.read_text()}")


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, without a last line that is still being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def newest(run: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a run and its manifest."""
    if (path := max((run / "checkpoints").glob("step-*"), default=None)) is None:
        raise Failed(f"{run}: has no checkpoint")
    return path, json.loads((path / "manifest.json").read_text())


def check_half(run: Half, half: Path, commit: str) -> int:
    """Return the step from which a resume continues, after a check that the half-done run is as intended."""
    if (made_by := json.loads((half / "run.json").read_text())["git"]) != {"commit": commit, "dirty": False}:
        raise Failed(f"{half}: was made by {made_by}, not by {commit}")
    manifest, (first, last) = newest(half)[1], run.between
    step: int = manifest["step"]
    if not first <= step <= last or (run.rolls_back and not manifest.get("detours")):
        raise Failed(f"{half}: ended at step {step}, not between {first} and {last}, or without a rollback")
    return step


def learned(run: Path, half: Path) -> dict[str, dict[str, str]]:
    """Names and values, or hashes, of each part of a run that continued `half`."""
    path, manifest = newest(run)
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    rows, before = lines(run / "metrics.jsonl"), lines(half / "metrics.jsonl")
    # Rows contain times, so both files have a row in common only if its steps were not trained again.
    if not (kept := sum(row in before for row in rows)):
        raise Failed(f"{run}: was not resumed but started over")
    values = {f"{name} of step {row['step']}": repr(value) for row in rows for name, value in row.items()}
    values = {name: value for name, value in values.items() if not name.startswith(OF_THE_MACHINE)}
    return {
        "weights": {file.name: sha256(file.read_bytes()) for file in sorted(run.glob("*.safetensors"))},
        "checkpoint": dict(leaves({"step": manifest["step"], "detours": manifest.get("detours"), "state": state})),
        "metrics": {"rows of the first half": repr(kept), **values},
    }


def leaves(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Name and value, or hash, of every leaf of nested lists and mappings."""
    if isinstance(value, Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{value.dtype} {tuple(value.shape)} {sha256(content)}"
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(item, f"{name}.{key}")
    else:
        yield name, repr(value)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def verdict(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """The common hash of a part of two runs, or both hashes and the first differences."""
    first, second = (sha256(json.dumps(part, sort_keys=True).encode())[:16] for part in (before, after))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return f"{first} became {second} ({len(names)} of {len(before)}: {', '.join(names[:3])})" if names else first


def compare(run: Half, folder: Path, new: Path, commit: str) -> bool:
    """Resume `folder`/half with the code of this checkout, and compare its end with that of `folder`/old."""
    half = folder / "half"
    step = check_half(run, half, commit)
    resume(half, new, ROOT)
    before, after = learned(folder / "old", half), learned(new, half)
    parts = ", ".join(f"{part} {verdict(before[part], after[part])}" for part in before)
    print(f"{'equal' if before == after else 'DIFFERENT'}: {run.name} from step {step}: {parts}", flush=True)
    return before == after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="the older commit")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the runs of the older commit there")
    kept.add_argument("--runs", type=Path, metavar="FOLDER", help="take the runs of the older commit from there")
    parser.add_argument("--only", choices=[run.name for run in HALVES], help="one run alone")
    asked = parser.parse_args()
    commit, results = git("rev-parse", "--verify", f"{asked.commit}^{{commit}}"), []
    with tempfile.TemporaryDirectory(prefix="opsin-resume-") as name, ExitStack() as stack:
        folder = (asked.runs or asked.keep or Path(name, "kept")).resolve()
        old = None if asked.runs else Path(name, "checkout")
        if old is not None:
            git("worktree", "add", "--quiet", "--detach", str(old), commit)
            stack.callback(git, "worktree", "remove", "--force", str(old))
        for code in filter(None, (old, ROOT)):
            check_import(code, Path(name, "messages"))
        for run in (run for run in HALVES if asked.only in (None, run.name)):
            work = folder / run.name
            try:
                if old is not None:
                    work.mkdir(parents=True)
                    begin(run, work / "half", old)
                    resume(work / "half", work / "old", old)
                results.append(compare(run, work, Path(name, run.name), commit))
            except Failed as error:
                print(f"FAILED: {run.name}: {error}", flush=True)
                results.append(False)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
