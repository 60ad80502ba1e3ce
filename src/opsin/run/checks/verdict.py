"""The answers of `opsin check`."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["fine", "look", "fault"]
"""`fine`; `look`: training works, and something deserves a look; `fault`: training would fail or learn nothing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that was looked at."""

    name: str
    level: Level
    text: str
    """The value, the rule and the way out; for `fine` the value alone."""
