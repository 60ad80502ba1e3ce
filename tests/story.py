"""A teller that keeps what it is given."""

from collections.abc import Mapping

from opsin.storage.teller import Fact


class Story:
    """Lines and events in the order in which they were reported; implements `Teller`."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.warnings: list[str] = []
        self.events: list[tuple[str, Mapping[str, Fact]]] = []
        """Kinds and facts."""

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def tell(
        self, kind: str, step: int | None = None, *, notice: str | None = None, warn: str | None = None, **facts: Fact
    ) -> None:
        self.events.append((kind, facts))
        if warn is not None:
            self.warnings.append(warn)
        if notice is not None:
            self.notices.append(notice)


class Calm(Story):
    """A teller for what must go well: a warning fails the test."""

    def warning(self, text: str) -> None:
        raise AssertionError(text)
