"""The kinds of storage that `data.path` can name, and the interface of a kind of one's own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from opsin.settings.extensions import subclasses
from opsin.settings.faults import did_you_mean

if TYPE_CHECKING:
    from opsin.data.sources.labels import Labels, Opened

KINDS = ("digits", "cifar10", "folder", "csv", "parquet")
"""The kinds of storage that come with opsin."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The settings of a recipe's `data` that say what to open."""

    path: str
    """`data.path` as it is written."""
    root: Path
    """The same with `~` replaced."""
    labels: "Labels"
    image_column: str | None
    label_column: str | None
    cache: Path
    """A folder for files that are made once."""


class SourceKind(ABC):
    """A kind of storage of one's own; `data.kind` finds every subclass that is imported."""

    name: ClassVar[str]
    """Value of `data.kind`."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """True if `data.kind=auto` takes this kind for a path; asked before the kinds that come with opsin."""
        return False

    @classmethod
    @abstractmethod
    def open(cls, asked: Asked) -> "Opened":
        """Return the sources of training and validation images.

        Raises:
            DataError: the path is missing, empty or damaged.
        """


def own_kinds() -> dict[str, type[SourceKind]]:
    """Every imported kind of storage that does not come with opsin, by name."""
    return {kind.name: kind for kind in subclasses(SourceKind)}


def check_kind(kind: str) -> str:
    """Return `kind` if it is known.

    Raises:
        ValueError: it is not.
    """
    known = ("auto", *KINDS, *own_kinds())
    if kind not in known:
        raise ValueError(f"{kind!r} does not fit; must be one of {', '.join(known)}{did_you_mean(kind, known)}")
    return kind
