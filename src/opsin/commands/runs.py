"""`opsin runs` and `opsin verify`: runs in a folder, and proof that a recipe resumes exactly."""

import argparse
import json
from pathlib import Path

from opsin.commands.arguments import Commands, path, signals_interrupt, take_recipe


def add_commands(commands: Commands) -> None:
    """Add `runs` and `verify`."""
    runs = commands.add_parser("runs", help="list run directories with their state and scores")
    runs.add_argument("folder", nargs="?", type=path, default=Path("runs"), help="where to look (default: runs)")
    runs.add_argument("--json", action="store_true", help="print one JSON object per run")
    runs.set_defaults(run=_runs)
    verify = commands.add_parser("verify", help="train straight, and killed and resumed; compare the weights' hashes")
    take_recipe(verify)
    verify.add_argument("--steps", type=int, default=200, help="steps to train (default: 200)")
    verify.add_argument("--kills", type=int, default=3, help="times to kill the second run (default: 3)")
    verify.set_defaults(run=_verify)


def _runs(arguments: argparse.Namespace) -> None:
    from opsin.storage.listing import list_runs, runs_table

    found = list_runs(arguments.folder)
    if arguments.json:
        for run in found:
            print(json.dumps(run.as_dict()))
    else:
        print("\n".join(runs_table(found)) if found else f"no runs in {arguments.folder}")


@signals_interrupt()
def _verify(arguments: argparse.Namespace) -> int:
    from opsin.commands.verify import verify

    return verify(arguments.recipe, arguments.overrides, steps=arguments.steps, kills=arguments.kills)
