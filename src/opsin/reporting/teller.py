"""Tellers: what a run and what a command report, to people and to programs."""

import sys

from opsin.reporting.console import Console
from opsin.reporting.journal import Journal
from opsin.storage.teller import Fact


class RunTeller:
    """Lines on the console of a run, events in its journal."""

    def __init__(self, journal: Journal, console: Console) -> None:
        self.journal = journal
        self.console = console

    def notice(self, text: str) -> None:
        """A line on something worth knowing."""
        self.console.notice(text)

    def warning(self, text: str) -> None:
        """A line on something that is wrong, while training goes on."""
        self.console.warning(text)

    def tell(
        self, kind: str, step: int | None = None, *, notice: str | None = None, warn: str | None = None, **facts: Fact
    ) -> None:
        """Record an event with its facts; `notice` or `warn` is a line for people with it."""
        if step is None:
            step = 0 if self.journal.last is None else self.journal.last.step
        self.journal.event(kind, step, **facts)
        if warn is not None:
            self.console.warning(warn)
        if notice is not None:
            self.console.notice(notice)


class CommandTeller:
    """Lines on standard error: standard output is for the result of a command alone. Events are not recorded."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix

    def notice(self, text: str) -> None:
        """A line on something worth knowing."""
        print(f"{self._prefix}{text}", file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        """A line on something that is wrong, while the command goes on."""
        self.notice(f"warning: {text}")

    def tell(
        self, kind: str, step: int | None = None, *, notice: str | None = None, warn: str | None = None, **facts: Fact
    ) -> None:
        """The line for people that comes with an event."""
        if warn is not None:
            self.warning(warn)
        if notice is not None:
            self.notice(notice)
