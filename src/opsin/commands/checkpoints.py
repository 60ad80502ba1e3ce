"""The arguments of `opsin checkpoints`. `run/checkpoints.py` does the work, and is imported for it."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from opsin.errors import ConfigError


def add_checkpoints(command: argparse.ArgumentParser, as_path: Callable[[str], Path]) -> None:
    """Give the command its arguments."""
    command.add_argument("directory", type=as_path, metavar="DIR", help="run directory")
    actions = ("list", "verify", "prune", "restore")
    told = (
        "list (the default), verify (hash every file), prune (show what the recipe does not keep; --yes removes it), "
        "restore (go on from STEP)"
    )
    command.add_argument("action", nargs="?", choices=actions, default="list", metavar="ACTION", help=told)
    command.add_argument("step", nargs="?", type=int, metavar="STEP", help="the step to restore")
    command.add_argument("--yes", action="store_true", help="prune: remove what is shown")
    command.add_argument("--keep", type=int, metavar="N", help="prune: keep N of the newest, not checkpoints.keep")
    command.add_argument("--json", action="store_true", help="list, verify: print one JSON object per checkpoint")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if (arguments.action == "restore") != (arguments.step is not None):
        rule = "restore needs a STEP" if arguments.step is None else f"{arguments.action} takes no STEP"
        raise ConfigError(f"command line: {rule}; opsin checkpoints DIR lists them")
    if arguments.keep is not None and arguments.keep < 1:
        raise ConfigError(f"command line: --keep {arguments.keep} does not fit; must be at least 1")
    from opsin.run import checkpoints as checkpoints_command

    if arguments.action == "restore":
        checkpoints_command.restore(arguments.directory, arguments.step, say=print)
    elif arguments.action == "prune":
        _prune(arguments.directory, arguments.keep, yes=arguments.yes)
    else:
        stored = checkpoints_command.list_checkpoints(arguments.directory, content=arguments.action == "verify")
        if arguments.json:
            lines = [json.dumps(one.as_dict()) for one in stored]
        else:
            lines = checkpoints_command.checkpoints_table(stored)
        print("\n".join(lines))
        if arguments.action == "verify":
            checkpoints_command.check(stored)
    return 0


def _prune(directory: Path, keep: int | None, *, yes: bool) -> None:
    from opsin.run import checkpoints as checkpoints_command

    if yes:
        checkpoints_command.prune(directory, keep=keep, say=print)
        return
    doomed = checkpoints_command.superfluous(directory, keep=keep)
    for path in doomed:
        print(f"would remove {path.name}")
    print("--yes removes them" if doomed else "nothing to remove: the recipe keeps all of them")
