"""`opsin tune`: measure good settings before a run."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from opsin.commands.arguments import Commands, path, signals_interrupt, take_recipe
from opsin.errors import ConfigError

if TYPE_CHECKING:
    from opsin.run.parts import Parts
    from opsin.tuning.all import FullTuning
    from opsin.tuning.batch import BatchTuning


def add_commands(commands: Commands) -> None:
    """Add `tune`."""
    tune = commands.add_parser(
        "tune", help="measure good settings: learning rate, batch, loader, or all that changes the speed"
    )
    subjects = tune.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    lr = subjects.add_parser("lr", help="sweep the learning rate; write its curve and a recipe with the best one")
    take_recipe(lr)
    lr.add_argument("--out", type=path, metavar="DIR", help="where to write (default: runs/RECIPE-lr)")
    ends = "(default: 1e-5 to 1 for AdamW, else 1e-4 to 10)"
    lr.add_argument("--from", dest="first", type=float, metavar="LR", help=f"first learning rate {ends}")
    lr.add_argument("--to", dest="last", type=float, metavar="LR", help="last learning rate")
    lr.add_argument("--steps", type=int, default=200, help="updates to make (default: 200)")
    lr.add_argument("--quiet", action="store_true", help="print warnings only")
    lr.set_defaults(run=_lr)

    loader = subjects.add_parser("loader", help="find out whether training waits for the data, and the best settings")
    take_recipe(loader)
    loader.add_argument("--seconds", type=float, default=2.0, help="time for each measurement (default: 2)")
    loader.add_argument("--json", action="store_true", help="print one JSON object")
    loader.set_defaults(run=_loader)

    batch = subjects.add_parser("batch", help="find the number of images computed at a time that trains fastest")
    take_recipe(batch)
    _take_measuring(batch, folder="runs/RECIPE-batch", minutes=5)
    rule = "keep: batch_size stays (default); linear, sqrt: it changes, and the learning rate by this rule"
    batch.add_argument("--rule", choices=("keep", "linear", "sqrt"), default="keep", help=rule)
    batch.set_defaults(run=_batch)

    everything = subjects.add_parser("all", help="measure what changes the speed, one factor after another")
    take_recipe(everything)
    _take_measuring(everything, folder="runs/RECIPE-tuned", minutes=10)
    everything.set_defaults(run=_all)


def _take_measuring(command: argparse.ArgumentParser, *, folder: str, minutes: float) -> None:
    command.add_argument("--out", type=path, metavar="DIR", help=f"where to write (default: {folder})")
    command.add_argument(
        "--minutes", type=float, default=minutes, help=f"time for all measurements (default: {minutes:g})"
    )
    memory = "share of the free memory that each variant may take (default: 0.8)"
    command.add_argument("--memory", type=float, default=0.8, metavar="SHARE", help=memory)
    inexact = "also take what changes the mathematics of training, not its rounding alone"
    command.add_argument("--inexact", action="store_true", help=inexact)
    command.add_argument("--json", action="store_true", help="print one JSON object")


@signals_interrupt()
def _lr(arguments: argparse.Namespace) -> None:
    from opsin.tuning.lr import tune_lr

    asked = {name: getattr(arguments, name) for name in ("out", "first", "last", "steps", "quiet")}
    tune_lr(arguments.recipe, arguments.overrides, **asked)


@signals_interrupt()
def _loader(arguments: argparse.Namespace) -> None:
    from opsin.reporting.teller import CommandTeller
    from opsin.run.recipe import read
    from opsin.tuning.loader import tune_loader

    recipe = read(arguments.recipe, arguments.overrides)
    report = tune_loader(recipe, seconds=arguments.seconds, teller=CommandTeller())
    print(json.dumps(report.as_dict()) if arguments.json else "\n".join(report.lines()))


@signals_interrupt()
def _batch(arguments: argparse.Namespace) -> None:
    from opsin.tuning.batch import plan_tuning

    _check_measuring(arguments)
    asked = {"rule": arguments.rule, "inexact": arguments.inexact}
    _measure(arguments, *plan_tuning(arguments.recipe, arguments.overrides, **asked), folder="batch")


@signals_interrupt()
def _all(arguments: argparse.Namespace) -> None:
    from opsin.tuning.all import plan_full_tuning

    _check_measuring(arguments)
    planned = plan_full_tuning(arguments.recipe, arguments.overrides, inexact=arguments.inexact)
    _measure(arguments, *planned, folder="tuned")


def _measure(arguments: argparse.Namespace, tuning: "BatchTuning | FullTuning", parts: "Parts", *, folder: str) -> None:
    """Measure, and write and print the results, also those from before an interruption."""
    from opsin.reporting.teller import CommandTeller
    from opsin.run.tuned import TUNED, clear_results

    out = arguments.out or Path("runs", f"{Path(arguments.recipe).stem}-{folder}")
    clear_results(out, tuning.files)
    is_found = False
    try:
        tuning.measure(parts, fraction=arguments.memory, seconds=60 * arguments.minutes, teller=CommandTeller())
    finally:
        is_found = tuning.write(out)
        print(json.dumps(tuning.as_dict()) if arguments.json else "\n".join(tuning.lines()))
    if is_found and not arguments.json:
        print(f"wrote {out / TUNED} (train it with: opsin train {out / TUNED})")


def _check_measuring(arguments: argparse.Namespace) -> None:
    if not (math.isfinite(arguments.minutes) and arguments.minutes > 0):
        raise ConfigError(f"command line: --minutes {arguments.minutes:g}: must be above 0; use --minutes 5")
    if not 0 < arguments.memory <= 1:
        raise ConfigError(f"command line: --memory {arguments.memory:g}: must be above 0 and at most 1; use 0.8")
