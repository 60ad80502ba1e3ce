"""`opsin tune`: measure good settings before a run."""

import argparse
import json

from opsin.commands.arguments import Commands, path, signals_interrupt, take_recipe


def add_commands(commands: Commands) -> None:
    """Add `tune`."""
    tune = commands.add_parser("tune", help="measure good settings: `tune lr` for the learning rate")
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
