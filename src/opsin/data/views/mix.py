"""Mixup and CutMix: every image of a batch mixed with another one, by draws of its own.

Shapes: B images, C channels, S side in pixels.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from opsin.data.transfer import send

_NODES = 2049  # of the table of a beta distribution, on each axis


@dataclass(frozen=True, slots=True)
class Mixed:
    """A mixed batch. The target of image i is `shares[i]` of its label and the rest of `partners[i]`'s."""

    images: Tensor
    """[B, C, S, S]"""
    partners: Tensor
    """int64 [B]: the image of the batch that was mixed in; a permutation."""
    shares: Tensor
    """float32 [B]: the share of the image itself; 1 if nothing was mixed in."""


@dataclass(frozen=True)
class Mix:
    """An image mixed with its partner, with probability `p`; each image has its own share and box.

    Mixup, Zhang et al. 2018, section 2: both images are averaged, with shares from
    Beta(`mixup`, `mixup`). CutMix, Yun et al. 2019, section 3: a box with sides S sqrt(1 - share),
    share from Beta(`cutmix`, `cutmix`), around any pixel shows the partner; what lies outside is cut
    off, and the share becomes that of the pixels that remain. As in the published code, sides are
    rounded down to an even number. A parameter of 0 turns its kind off; where both are on,
    `cutmix_share` is the probability of CutMix.
    """

    mixup: float
    cutmix: float
    p: float = 1.0
    cutmix_share: float = 0.5
    num_draws: ClassVar[int] = 6

    def __call__(self, images: Tensor, draws: Tensor) -> Mixed:
        """Float images [B, C, S, S], normalised or not, with draws [B, num_draws] in [0, 1) on the CPU."""
        chosen, kind, level, row, column, order = draws.unbind(1)
        partners = send(torch.argsort(order, stable=True), images.device)
        cut = kind < (self.cutmix_share if self.mixup and self.cutmix else float(self.cutmix > 0))
        shares = torch.where(cut, beta_quantile(self.cutmix, level), beta_quantile(self.mixup, level))
        shares = torch.where(chosen < self.p, shares, 1.0)
        sides = _box_sides(images.shape[-1], shares, row, column)
        cut, shares, sides = (send(known, images.device) for known in (cut, shares, sides))
        outside = _outside_box(images.shape[-1], sides)  # [B, S, S]
        weights = torch.where(cut[:, None, None], outside, shares[:, None, None])
        shares = torch.where(cut, outside.mean((1, 2)), shares)
        # A weight of 1 gives the bits of the image: tests/unit/data/views/test_mix.py.
        mixed = torch.lerp(images[partners], images, weights[:, None].to(images.dtype))
        return Mixed(mixed, partners, shares)


def beta_quantile(alpha: float, levels: Tensor) -> Tensor:
    """The number that a draw from Beta(alpha, alpha) stays below with probability `levels`: float32 [B].

    `levels` are float32 [B] in [0, 1), on the CPU. From a table with errors below 1e-5 for alpha from 0.05 to 10. 1 for
    alpha 0.
    """
    if not alpha:
        return torch.ones_like(levels)
    known, values = _beta_table(alpha)
    levels = levels.contiguous()
    above = torch.searchsorted(known, levels, right=True)
    below = above - 1
    return values[below] + (values[above] - values[below]) * (levels - known[below]) / (known[above] - known[below])


@cache
def _beta_table(alpha: float) -> tuple[Tensor, Tensor]:
    """Levels and their quantiles, both from 0 to 1: steps are short in levels and in quantiles."""
    from scipy import special

    nodes = np.sin(np.linspace(0, np.pi / 2, _NODES)) ** 2  # closer at both ends, where a beta distribution bends
    levels = np.union1d(nodes.astype(np.float32), special.betainc(alpha, alpha, nodes).astype(np.float32))
    values = special.betaincinv(alpha, alpha, levels.astype(np.float64))
    return torch.from_numpy(levels), torch.from_numpy(values).float()


def _box_sides(side: int, shares: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """First and last but one row, then column, of a box of each image that covers 1 - share of it: int64 [4, B]."""
    half = (side / 2 * torch.sqrt(1 - shares)).long()
    down, across = (row * side).long(), (column * side).long()
    return torch.stack([down - half, down + half, across - half, across + half])


def _outside_box(side: int, sides: Tensor) -> Tensor:
    """1.0 outside the box of each image and 0.0 inside: float32 [B, S, S]."""
    pixels = torch.arange(side, device=sides.device)
    top, bottom, left, right = sides[..., None].unbind(0)  # [B, 1]
    rows, columns = (pixels >= top) & (pixels < bottom), (pixels >= left) & (pixels < right)
    return (~(rows[:, :, None] & columns[:, None, :])).float()
