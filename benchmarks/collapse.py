"""Collapse on purpose: whether the verdicts of the monitors name what was done to a run, and how soon.

    PYTHONPATH=src python benchmarks/collapse.py [--steps 300]

DINO on the bundled digits, small, on the CPU: a healthy run, and runs without centring, with a high temperature of the
teacher, and with a teacher that is a copy of the student: centring then lags behind it, and one prototype wins. The
advice tells the last from the first.
"""

import argparse
import tempfile
from pathlib import Path

from interleaved import table
from opsin.recipe import read
from opsin.reporting import read_events
from opsin.session import train_recipe

HEALTHY = (
    "log.every=10",
    "log.tensorboard=false",
    "log.plots=false",
    "checkpoints.every=never",
    "checkpoints.best=null",
    "evaluators.knn=null",
    "evaluators.linear=null",
    "monitors.collapse.every=10 steps",
)
CASES: dict[str, tuple[str, ...]] = {
    "healthy": (),
    "no centring": ("method.center_momentum=1",),
    "teacher's temperature 1": ("method.teacher_temperature=1",),
    "momentum 0": ("method.momentum=0", "epochs=200"),
}
EXPECTED = {
    "healthy": "",
    "no centring": "one_prototype_collapse",
    "teacher's temperature 1": "uniform_collapse",
    "momentum 0": "one_prototype_collapse",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    rows = []
    for name, changes in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            wanted = read("dino-digits", [*HEALTHY, f"limits.steps={arguments.steps}", *changes])
            train_recipe(wanted, Path(folder) / "run", name=name, quiet=True)
            found = [event for event in read_events(Path(folder) / "run" / "events.jsonl") if event.kind == "alert"]
        first = found[0] if found else None
        verdict = "none" if first is None else f"{first.facts['finding']} at step {first.step}"
        rows.append([name, EXPECTED[name] or "none", verdict])
        print(f"{name}: {verdict if first is None else first.facts['message']}", flush=True)
    print(table(["what was done", "expected", "first verdict"], rows))


if __name__ == "__main__":
    main()
