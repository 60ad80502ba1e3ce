"""`opsin checkpoints`: list, verify, prune or restore the checkpoints of a run."""

import argparse
import json
import sys
from pathlib import Path

from opsin.commands.arguments import Commands, path
from opsin.errors import ConfigError


def add_commands(commands: Commands) -> None:
    """Add `checkpoints`."""
    command = commands.add_parser("checkpoints", help="list, verify, prune or restore the checkpoints")
    command.add_argument("directory", type=path, metavar="DIR", help="run directory")
    actions = (
        "list (the default), verify (hash every file), prune (show those that the recipe does not keep; --yes removes "
        "them), restore (continue from STEP)"
    )
    known = ("list", "verify", "prune", "restore")
    command.add_argument("action", nargs="?", choices=known, default="list", metavar="ACTION", help=actions)
    command.add_argument("step", nargs="?", type=int, metavar="STEP", help="the step to restore")
    command.add_argument("--yes", action="store_true", help="prune: remove what is shown")
    command.add_argument("--keep", type=int, metavar="N", help="prune: keep N of the newest, not checkpoints.keep")
    command.add_argument("--json", action="store_true", help="list, verify: print one JSON object per checkpoint")
    command.set_defaults(run=_checkpoints)


def _checkpoints(arguments: argparse.Namespace) -> None:
    if (arguments.action == "restore") != (arguments.step is not None):
        rule = "restore needs a STEP" if arguments.step is None else f"{arguments.action} takes no STEP"
        raise ConfigError(f"command line: {rule}; opsin checkpoints DIR lists them")
    if arguments.keep is not None and arguments.keep < 1:
        raise ConfigError(f"command line: --keep {arguments.keep} does not fit; must be at least 1")
    from opsin.reporting.console import Console
    from opsin.run import checkpoints

    if arguments.action == "restore":
        checkpoints.restore(arguments.directory, arguments.step, teller=Console(sys.stdout))
    elif arguments.action == "prune":
        _prune(arguments.directory, arguments.keep, yes=arguments.yes)
    else:
        stored = checkpoints.list_checkpoints(arguments.directory, content=arguments.action == "verify")
        table = checkpoints.checkpoints_table(stored)
        print("\n".join([json.dumps(one.as_dict()) for one in stored] if arguments.json else table))
        if arguments.action == "verify":
            checkpoints.check(stored)


def _prune(directory: Path, keep: int | None, *, yes: bool) -> None:
    from opsin.reporting.console import Console
    from opsin.run import checkpoints

    if yes:
        checkpoints.prune(directory, keep=keep, teller=Console(sys.stdout))
        return
    doomed = checkpoints.superfluous(directory, keep=keep)
    for folder in doomed:
        print(f"would remove {folder.name}")
    print("--yes removes them" if doomed else "nothing to remove: the recipe keeps all of them")
