"""Collapse on purpose: whether the verdicts of the monitors name what was done to a run, and how soon.

    PYTHONPATH=src python benchmarks/collapse.py [--steps 300] [--method dino|ijepa|hjepa]

On the bundled digits, small, on the CPU: healthy runs, and runs that must collapse.

DINO without centring, with a high temperature of the teacher, and with a teacher that is a copy of the student:
centring then lags behind it, and one prototype wins. The advice tells the last from the first.

I-JEPA and H-JEPA with a target encoder that is a copy of the encoder, without the norm of targets, and with both. The
second does not collapse: the encoder ends in a norm of its own. Both together narrow for some dozens of updates, and
get out of it by themselves. The exit status is 1 where a verdict is not the expected one.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from interleaved import table
from opsin.reporting.journal import Event, read_events, read_rows
from opsin.run.recipe import read
from opsin.run.session import train_recipe

QUIET = (
    "log.every=10",
    "log.tensorboard=false",
    "log.plots=false",
    "checkpoints.every=never",
    "checkpoints.best=null",
    "evaluators.knn=null",
    "evaluators.linear=null",
    "monitors.collapse.every=10 steps",
)


@dataclass(frozen=True, slots=True)
class Case:
    """What is done to a run, and the verdict that is right."""

    method: str
    what: str
    changes: tuple[str, ...] = ()
    expected: str = "none"


COPY, BARE = ("method.momentum=0", "epochs=200"), ("method.norm_targets=false",)
CASES = [
    Case("dino", "healthy"),
    Case("dino", "no centring", ("method.center_momentum=1",), "one_prototype_collapse"),
    Case("dino", "teacher's temperature 1", ("method.teacher_temperature=1",), "uniform_collapse"),
    Case("dino", "momentum 0", COPY, "one_prototype_collapse"),
    *(
        case
        for method in ("ijepa", "hjepa")
        for case in (
            Case(method, "healthy"),
            Case(method, "momentum 0", COPY, "feature_collapse"),
            Case(method, "targets without norm", BARE),
            Case(method, "momentum 0, targets without norm", (*COPY, *BARE)),
        )
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--method", choices=sorted({case.method for case in CASES}), help="only this one")
    arguments = parser.parse_args()
    rows, wrong = [], 0
    for case in CASES:
        if arguments.method not in (None, case.method):
            continue
        alerts, course = watch(case, arguments.steps)
        verdict = f"{alerts[0].facts['finding']} at step {alerts[0].step}" if alerts else "none"
        wrong += verdict.partition(" ")[0] != case.expected
        rows.append([f"{case.method}: {case.what}", case.expected, verdict])
        print(f"{case.method}: {case.what}: {alerts[0].facts['message'] if alerts else 'none'}")
        print(f"    {course}", flush=True)
    print(table(["what was done", "expected", "first verdict"], rows))
    return int(wrong > 0)


def watch(case: Case, steps: int) -> tuple[Sequence[Event], str]:
    """The alerts of a run, and how the narrowest of its features went."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        wanted = read(f"{case.method}-digits", [*QUIET, f"limits.steps={steps}", *case.changes])
        train_recipe(wanted, run, name=case.what, quiet=True)
        alerts = [event for event in read_events(run / "events.jsonl") if event.kind == "alert"]
        rows = [row for row in read_rows(run / "metrics.jsonl") if row.step % 50 == 0]
    return alerts, ", ".join(f"{row.step}: {_narrowest(row.values)}" for row in rows)


def _narrowest(values: Mapping[str, float]) -> str:
    """The smallest spread, rank and length of the encoders' features."""
    of_encoders = [name for name in values if re.match(r"collapse/(?!prediction)", name)]
    return " ".join(
        f"{kind} {min(values[name] for name in of_encoders if name.endswith(kind)):.2g}"
        for kind in ("std", "rank", "norm")
    )


if __name__ == "__main__":
    sys.exit(main())
