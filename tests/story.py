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


class Record(Story):
    """A teller that also is the record of a run, with the step of each event among its facts."""

    def __init__(self, scores: Mapping[int, float] | None = None) -> None:
        super().__init__()
        self._scores = scores or {}

    def tell(
        self, kind: str, step: int | None = None, *, notice: str | None = None, warn: str | None = None, **facts: Fact
    ) -> None:
        self.events.append((kind, {"step": step, **facts}))
        self.warnings += [] if warn is None else [warn]
        self.notices += [] if notice is None else [notice]

    def sync(self) -> None:
        pass

    def history(self, name: str) -> Mapping[int, float]:
        return self._scores

    @property
    def kinds(self) -> list[str]:
        """The kinds of the events."""
        return [kind for kind, _ in self.events]
