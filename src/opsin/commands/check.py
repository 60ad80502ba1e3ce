"""`opsin check`: look at a recipe, its pictures and this machine before a run."""

import argparse
import json
from pathlib import Path

from opsin.commands.arguments import Commands, path, signals_interrupt, take_recipe


def add_commands(commands: Commands) -> None:
    """Add `check`."""
    check = commands.add_parser("check", help="look at recipe, pictures, learning and machine before a run")
    take_recipe(check)
    check.add_argument("--out", type=path, metavar="DIR", help="the run directory to come (default: runs/RECIPE)")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_check)


@signals_interrupt()
def _check(arguments: argparse.Namespace) -> int:
    from opsin.reporting.teller import CommandTeller
    from opsin.run.checks.check import check_recipe

    out = arguments.out or Path("runs", Path(arguments.recipe).stem)
    report = check_recipe(arguments.recipe, arguments.overrides, out, CommandTeller())
    print(json.dumps(report.as_dict()) if arguments.json else "\n".join(report.lines()))
    return 2 if report.faults else 0
