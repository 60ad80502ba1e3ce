"""Arguments that several commands take, and how signals end a command."""

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from opsin.training.stop import SIGNALS, Interrupt

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def path(text: str) -> Path:
    """Return the path of `text`, whose `~` no shell expands in `--out=~/runs`."""
    return Path(os.path.expanduser(text))


def take_recipe(command: argparse.ArgumentParser) -> None:
    """Add a recipe with changed keys."""
    command.add_argument("recipe", help="a shipped recipe (see `opsin recipes`) or a YAML file")
    take_overrides(command)


def take_overrides(command: argparse.ArgumentParser) -> None:
    """Add changed keys of a recipe."""
    keys = "recipe keys to change, as key=value (optim.lr=0.001)"
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=keys)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end the process as Ctrl-C does, until training handles them itself."""
    interrupt = Interrupt()
    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
