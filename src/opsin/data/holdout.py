"""Images of a source, held out for validation.

Shapes: N images of a source, n of a part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsin.clock import seeding
from opsin.data.base import Source
from opsin.errors import DataError


@dataclass
class Subset:
    """The images of `source` at `indices` (int64 [n]), in that order."""

    name: str
    source: Source
    indices: Tensor

    def __post_init__(self) -> None:
        self.classes = self.source.classes
        self.labels = self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        """The image as uint8 [3, H, W]."""
        return self.source.read(int(self.indices[index]))

    def location(self, index: int) -> str:
        """The location of the image in `source`."""
        return self.source.location(int(self.indices[index]))


def hold_out(source: Source, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Divide a source into a training and a validation part, both in its order.

    The rounded `fraction` of every class validates: at least one image and not all of them, if the class has two. A
    single image trains. Unlabelled images count as one class. The choice depends on `(seed, index)` only.

    Raises:
        DataError: fewer than two images of any class, so that none can be held out.
    """
    assert 0 < fraction < 1, "the recipe checks data.holdout"
    draws = seeding.uniform(seed, 0, torch.arange(len(source)), "holdout", 1)[:, 0]  # [N]
    held = torch.zeros(len(source), dtype=torch.bool)
    for label in sorted(set(source.labels.tolist())):
        members = (source.labels == label).nonzero()[:, 0]
        if len(members) >= 2:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            held[members[draws[members].argsort(stable=True)[:count]]] = True
    if not held.any():
        raise DataError(
            f"{source.name}: {len(source)} images, no class with two of them; data.holdout={fraction} "
            f"sets apart at least one image of a class and trains on another: add images, or a val folder"
        )
    return (
        Subset(f"{source.name} without holdout", source, (~held).nonzero()[:, 0]),
        Subset(f"{source.name} holdout", source, held.nonzero()[:, 0]),
    )
