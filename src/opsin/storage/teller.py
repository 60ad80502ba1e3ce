"""The interface of what reports while it works. `reporting/teller.py` has the tellers of runs and of commands."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

Fact: TypeAlias = "str | int | float | bool | Sequence[Fact] | Mapping[str, Fact] | None"
"""A value of an event; anything that JSON can hold."""


class Teller(Protocol):
    """Reports lines to people, and records events for programs. Every method may be called in any thread."""

    def notice(self, text: str) -> None:
        """A line on something worth knowing."""
        ...

    def warning(self, text: str) -> None:
        """A line on something that is wrong, while work goes on."""
        ...

    def tell(
        self, kind: str, step: int | None = None, *, notice: str | None = None, warn: str | None = None, **facts: Fact
    ) -> None:
        """Record an event with its facts; `notice` or `warn` is a line for people with it.

        `step` is that of the newest row of the run if it is None. A subclass that has no record leaves this as it is.
        """
        if warn is not None:
            self.warning(warn)
        if notice is not None:
            self.notice(notice)


class Owner(Protocol):
    """The holder of a run directory's lock."""

    def check_held(self) -> None:
        """Raise LockLost if another process holds the lock by now."""
        ...


class Silence(Teller):
    """A teller that reports nothing."""

    def notice(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        pass
