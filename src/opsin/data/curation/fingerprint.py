"""Fingerprints, by which copies of an image are found: one of its exact pixels, one of its looks.

The perceptual hash is a difference hash (N. Krawetz, "Kind of Like That", 2013) in both directions: the image is
reduced to 9 x 9 grey cells, and each of its 128 bits is set if a cell is darker than its right or its lower
neighbour. Scale, compression, colour and moderate brightness hardly change it; crops and mirrors do.

Shapes: H, W of an image in pixels.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS = 128
"""Length of the perceptual hash."""

MIN_DETAIL = 32
"""Neighbouring cells that must differ visibly before a hash means anything: flat images all hash alike."""

_VISIBLE = 2
_CELLS = 9


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`exact` is equal for equal pixels, `perceptual` (two words of 64 bits) similar for images that look alike."""

    exact: int
    """In [0, 2**63)."""
    perceptual: tuple[int, int]
    detail: int
    """Number of the 128 neighbouring cells that differ by more than rounding; 0 for an image smaller than the cells."""


def fingerprint(pixels: NDArray[np.uint8]) -> Fingerprint:
    """Return the fingerprint of an image uint8 [H, W, 3]."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(pixels).data)
    cells = _reduce(pixels)
    right = cells[:-1, 1:] - cells[:-1, :-1]  # [8, 8]
    down = cells[1:, :-1] - cells[:-1, :-1]  # [8, 8]
    detail = (abs(right) >= _VISIBLE).sum() + (abs(down) >= _VISIBLE).sum()
    return Fingerprint(
        exact=int.from_bytes(digest.digest(), "little") >> 1,
        perceptual=(_word(right > 0), _word(down > 0)),
        detail=int(detail) if min(pixels.shape[:2]) >= _CELLS else 0,
    )


def _reduce(pixels: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Grey cells [9, 9] in 0..255, each an average over its surroundings."""
    grey = Image.fromarray(pixels).convert("L")
    return np.asarray(grey.resize((_CELLS, _CELLS), Image.Resampling.BILINEAR)).astype(np.int16)


def _word(bits: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits.ravel()).tobytes(), "little")
