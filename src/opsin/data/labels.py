"""Class names to class numbers."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from opsin.errors import DataError


def find_classes(names: Iterable[str | None]) -> tuple[str, ...]:
    """Every class once, sorted; in numeric order if all are whole numbers. None is no class."""
    distinct = {name for name in names if name is not None}
    if all(name.isdecimal() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def index_labels(names: Sequence[str | None], classes: Sequence[str], place: str) -> Tensor:
    """Class numbers int64 [N]; None becomes -1, unlabelled.

    Raises:
        DataError: a name is not among `classes`, those of the training images.
    """
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
    numbers[None] = -1
    unknown = find_classes(name for name in set(names) if name not in numbers)
    if unknown:
        shown = ", ".join(repr(name) for name in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise DataError(
            f"{place}: validation images of classes without training images ({shown}; {len(unknown)} in all); "
            f"both splits need the same classes: add training images, or remove these validation images"
        )
    return torch.tensor([numbers[name] for name in names], dtype=torch.int64)


def no_labels(count: int) -> Tensor:
    """-1 for each of `count` images: int64 [N]."""
    return torch.full((count,), -1, dtype=torch.int64)
