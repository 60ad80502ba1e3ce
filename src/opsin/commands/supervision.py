"""What `train` and `resume` take on the command line to be started again after a crash."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opsin.errors import ConfigError
from opsin.processes.trail import end_with_supervisor


def take_supervision(command: argparse.ArgumentParser) -> None:
    """Give a command the options."""
    restarts = "start again up to N times after a crash, from the newest checkpoint"
    command.add_argument("--restarts", type=_count, metavar="N", help=restarts)
    aside = "after K crashes in a row at one place, go on without its images"
    command.add_argument("--quarantine-after", type=_count, metavar="K", help=aside)


def supervised(arguments: argparse.Namespace, command: Sequence[str], out: Path, *, fresh: bool = False) -> int | None:
    """The exit status of `command`, which trains in `out`, run under supervision; None where that is not asked for."""
    if arguments.restarts is None:
        if arguments.quarantine_after is not None:
            raise ConfigError("command line: --quarantine-after goes with --restarts N: without, nothing goes on")
        end_with_supervisor()
        return None
    from opsin.processes.supervisor import Supervision, supervise

    program = (sys.executable, "-P", "-X", "faulthandler", "-m", "opsin")
    settings = Supervision(program, arguments.restarts, arguments.quarantine_after)
    quiet = ["--quiet"] if arguments.quiet else []
    return supervise([*command, *quiet], out, settings, fresh=fresh, quiet=arguments.quiet)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
