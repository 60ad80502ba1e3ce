"""`opsin train` and `opsin resume`: in this process, or in children of a supervisor."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from opsin.commands.arguments import Commands, path, signals_interrupt, take_overrides, take_recipe
from opsin.errors import ConfigError


def add_commands(commands: Commands) -> None:
    """Add `train` and `resume`."""
    train = commands.add_parser("train", help="train a recipe, from the newest checkpoint of DIR if it has one")
    take_recipe(train)
    train.add_argument("--out", metavar="DIR", help="run directory (default: runs/RECIPE), or s3://BUCKET/FOLDER")
    train.add_argument("--fresh", action="store_true", help="start over; an earlier run in DIR is renamed")
    train.set_defaults(run=_train)
    resume = commands.add_parser("resume", help="continue a run, with changed keys if wanted")
    resume.add_argument("directory", metavar="DIR", help="run directory, or s3://BUCKET/FOLDER")
    take_overrides(resume)
    resume.set_defaults(run=_resume)
    for command in (train, resume):
        local = "with an address for DIR: the folder of the run on this machine (default: in ~/.cache/opsin/runs)"
        command.add_argument("--local", type=path, metavar="FOLDER", help=local)
        command.add_argument("--quiet", action="store_true", help="print warnings only")
        restarts = "start again up to N times after a crash, from the newest checkpoint"
        command.add_argument("--restarts", type=_count, metavar="N", help=restarts)
        quarantine = "after K crashes in a row at the same step or image, continue without its images"
        command.add_argument("--quarantine-after", type=_count, metavar="K", help=quarantine)


def _train(arguments: argparse.Namespace) -> int | None:
    name = Path(arguments.recipe).stem
    out = _directory_to_train(arguments)
    command = ["train", arguments.recipe, *arguments.overrides, "--out", str(out)]
    if arguments.restarts is not None:
        return _supervise(arguments, command, out, fresh=arguments.fresh)
    _train_alone(arguments)
    with signals_interrupt():
        from opsin.reporting.console import open_console
        from opsin.run.choice import choose
        from opsin.run.session import train_recipe

        begun = None if arguments.fresh else out
        recipe = choose(arguments.recipe, arguments.overrides, begun, open_console(quiet=arguments.quiet))
        train_recipe(recipe, out, name=name, fresh=arguments.fresh, quiet=arguments.quiet)
    return None


def _resume(arguments: argparse.Namespace) -> int | None:
    directory = _directory_to_resume(arguments)
    if arguments.restarts is not None:
        return _supervise(arguments, ["resume", str(directory), *arguments.overrides], directory)
    _train_alone(arguments)
    with signals_interrupt():
        from opsin.run.session import resume_run

        resume_run(directory, arguments.overrides, quiet=arguments.quiet)
    return None


def _directory_to_train(arguments: argparse.Namespace) -> Path:
    """Return the run directory; for one in a bucket, the folder on this machine that is copied there.

    Raises:
        OpsinError: as `find_elsewhere`, `begin_elsewhere`; or the overrides name another backup.
    """
    from opsin.reporting.teller import CommandTeller
    from opsin.storage.backup.elsewhere import begin_elsewhere, find_elsewhere
    from opsin.storage.directory import spelled_out

    wanted = arguments.out or os.path.join("runs", Path(arguments.recipe).stem)
    run = find_elsewhere(wanted, arguments.local)
    if run is None:
        return spelled_out(path(wanted))
    named = [text for text in arguments.overrides if text.startswith(("backup=", "backup.path="))]
    if named:
        raise ConfigError(f"command line: {named[0]} and --out {run.url} both name a backup of the run; give one")
    begin_elsewhere(run, CommandTeller("opsin: "))
    arguments.overrides.append(f"backup.path={run.url}")
    if not arguments.quiet:
        print(f"run directory: {run.folder} (another one: --local FOLDER), copied to {run.url}", flush=True)
    return run.folder


def _directory_to_resume(arguments: argparse.Namespace) -> Path:
    """Return the run directory; one in a bucket is fetched unless it is on this machine.

    Raises:
        OpsinError: as `find_elsewhere`, `fetch_elsewhere`.
    """
    from opsin.reporting.teller import CommandTeller
    from opsin.storage.backup.elsewhere import fetch_elsewhere, find_elsewhere

    run = find_elsewhere(arguments.directory, arguments.local)
    if run is None:
        return path(arguments.directory)
    fetch_elsewhere(run, CommandTeller("opsin: "))
    return run.folder


def _supervise(arguments: argparse.Namespace, command: Sequence[str], out: Path, *, fresh: bool = False) -> int:
    """Run `command`, which trains in `out`, in children that are started again after a crash."""
    from opsin.processes.supervisor import Supervision, supervise

    program = (sys.executable, "-P", "-X", "faulthandler", "-m", "opsin")
    settings = Supervision(program, arguments.restarts, arguments.quarantine_after)
    quiet = ["--quiet"] if arguments.quiet else []
    return supervise([*command, *quiet], out, settings, fresh=fresh, quiet=arguments.quiet)


def _train_alone(arguments: argparse.Namespace) -> None:
    """Prepare a training in this process, which may itself be the child of a supervisor."""
    if arguments.quarantine_after is not None:
        raise ConfigError("command line: --quarantine-after needs --restarts N: nothing is started again without it")
    from opsin.processes.trail import end_with_supervisor

    end_with_supervisor()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
