"""Commands as a user types them, and how their answers are judged."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.unit.data.pictures import fill

TINY = (
    "epochs=2",
    "batch_size=8",
    "device=cpu",
    "precision=fp32",
    "data.path=pictures",
    "data.workers=0",
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "checkpoints.every=1 epoch",
    "log.tensorboard=false",
    "log.plots=false",
)
"""Keys that make `quickstart` a training of a moment on the folder `pictures`."""

_SEVERAL = """
import contextlib, io, json, sys
from opsin.commands.main import main

answers = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    answers.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""


def pictures(folder: Path, classes: str = "ab", count: int = 12) -> Path:
    """A folder with `count` pictures in a folder for each class."""
    return fill(folder, *(f"{name}/{number}.png" for name in classes for number in range(count)))


def train(*keys: str, out: str = "run") -> tuple[str, ...]:
    """The arguments of a training of a moment."""
    return ("train", "quickstart", *TINY, *keys, "--out", out, "--quiet")


class Answer(NamedTuple):
    """What a command gave back."""

    status: int
    out: str
    err: str


def run_several(commands: Sequence[Sequence[str]], cwd: Path, env: Mapping[str, str]) -> list[Answer]:
    """The answers of several commands, one after another in one process: torch is imported once."""
    command = [sys.executable, "-c", _SEVERAL, json.dumps(commands)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return [Answer(*answer) for answer in json.loads(done.stdout)]


def deviation(answer: Answer, status: int, *faults: str) -> str:
    """What is wrong with an answer that should have this status and one line per fault, each like its pattern."""
    lines = answer.err.splitlines()
    fits = len(lines) == len(faults) and all(
        re.search(f"^opsin: {f}", line) for f, line in zip(faults, lines, strict=True)
    )
    return "" if answer.status == status and fits else f"status {answer.status}\n{answer.err}"
