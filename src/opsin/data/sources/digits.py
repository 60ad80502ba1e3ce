"""The bundled digits: 1,797 real hand-written digits of 8 x 8 pixels, part of scikit-learn."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Digits:
    """All digits; `images` is uint8 [N, 8, 8]."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        """One digit as uint8 [3, 8, 8]."""
        return self.images[index].repeat(3, 1, 1)

    def location(self, index: int) -> str:
        """`scikit-learn digits 17`."""
        return f"scikit-learn digits {index}"


def load_digits() -> Digits:
    """The digits with classes "0" to "9", ink 0..16 scaled to 0..255."""
    # Here, since importing scikit-learn takes a second.
    from sklearn import datasets

    bundle = datasets.load_digits()
    ink = torch.from_numpy(np.asarray(bundle.images, dtype=np.int64))  # [N, 8, 8]
    return Digits(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        labels=torch.from_numpy(np.asarray(bundle.target, dtype=np.int64)),
        images=((ink * 255 + 8) // 16).to(torch.uint8),
    )
