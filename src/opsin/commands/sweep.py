"""`opsin sweep`: the best of several values of some keys, by short trainings of which the best go on."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsin.commands.arguments import Commands, path, signals_interrupt
from opsin.errors import Stopped


def add_commands(commands: Commands) -> None:
    """Add `sweep`."""
    sweep = commands.add_parser("sweep", help="find the best of several values of some keys, by successive halving")
    sweep.add_argument("recipe", help="a shipped recipe (see `opsin recipes`) or a YAML file")
    keys = "recipe keys with the values to try, as key=a,b,c; a key with one value holds for all runs"
    sweep.add_argument("overrides", nargs="*", default=[], metavar="key=a,b", help=keys)
    sweep.add_argument("--metric", required=True, metavar="SCORE", help="the score that decides, such as val/top1")
    mode = "auto takes the lowest of a loss and the highest of all else (default: auto)"
    sweep.add_argument("--mode", choices=("auto", "max", "min"), default="auto", help=mode)
    sweep.add_argument("--out", type=path, metavar="DIR", help="folder of the runs (default: runs/RECIPE-sweep)")
    eta = "a share of 1/N of the runs goes on, N times as long (default: 3)"
    sweep.add_argument("--eta", type=int, default=3, metavar="N", help=eta)
    runs = "draw N combinations at random (default: all)"
    sweep.add_argument("--runs", type=int, metavar="N", help=runs)
    sweep.add_argument("--json", action="store_true", help="print one JSON object")
    sweep.set_defaults(run=_sweep)


@signals_interrupt()
def _sweep(arguments: argparse.Namespace) -> None:
    from opsin.reporting.teller import CommandTeller
    from opsin.tuning.search import Search, read_grid

    asked = {"metric": arguments.metric, "mode": arguments.mode, "eta": arguments.eta, "count": arguments.runs}
    grid = read_grid(arguments.recipe, arguments.overrides, **asked)
    folder = arguments.out or Path("runs", f"{Path(arguments.recipe).stem}-sweep")
    search = Search(grid, folder)
    try:
        search.run(Trainings(), CommandTeller())
    finally:  # also what was trained before an interruption
        print(json.dumps(search.as_dict()) if arguments.json else "\n".join(search.lines()))


@dataclass(frozen=True, slots=True)
class Trainings:
    """The `Trainer` of the command: each training is a process of its own, so that none can end the others."""

    def train(self, recipe: Path, out: Path, overrides: Sequence[str]) -> str:
        """Train `recipe` in `out`, or go on there; return the reason of a failure, else nothing.

        Raises:
            Stopped: the training was stopped; its state is saved.
        """
        from opsin.processes.trail import SUPERVISOR
        from opsin.training.checkpoints.format import find_checkpoints

        begun = bool(find_checkpoints(out / "checkpoints"))
        command = ["resume", str(out)] if begun else ["train", str(recipe), "--out", str(out)]
        environment = {
            **os.environ,
            SUPERVISOR: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with tempfile.TemporaryFile() as messages:
            child = subprocess.Popen(
                [sys.executable, "-m", "opsin", *command, *overrides, "--quiet"],
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                env=environment,
                process_group=0,  # Ctrl-C in a terminal reaches it once, through this process
            )
            try:
                status = child.wait()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
                child.wait()
                raise
            messages.seek(0)
            said = messages.read().decode(errors="replace").splitlines()
        last = next((line.removeprefix("opsin: ") for line in reversed(said) if line.strip()), "it said nothing")
        if status == 3:
            raise Stopped(f"{out}: {last}")
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        return last if status else ""
