"""RandAugment on whole batches: every image draws operations and signs of its own.

The 14 operations, their magnitudes and their order are those of torchvision's `RandAugment`. Images
are floats [B, C, S, S] in 0..1, before normalisation.

Shapes: B images, C = 3 channels, S side in pixels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.data.transfer import send
from opsin.data.views.colour import Change, blend, change_chosen, grey

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_GEOMETRY = range(1, 6)  # shear_x to rotate
_CACHED_VALUES = 1 << 18  # what a CPU changes at once, so that the steps of an operation stay in its cache


@dataclass(frozen=True)
class RandAugment:
    """`num_ops` operations in turn, each drawn evenly from `OPERATIONS`; Cubuk et al. 2020, section 3.

    `magnitude` is one of 0 to `bins - 1` and the same for all; of those operations that have a
    direction, half go the other way. `fill` shows where an image was moved away.

    Posterize and equalize work on 256 levels: the level of x is floor(255.999 x), which is v for a
    stored v / 255, and level v becomes v / 255 again.
    """

    num_ops: int = 2
    magnitude: int = 9
    bins: int = 31
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    fill: float = 0.5

    @property
    def num_draws(self) -> int:
        """An operation and a sign for each layer."""
        return 2 * self.num_ops

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        on_cpu = images.device.type == "cpu"
        images = images.clone() if on_cpu else images
        for layer in draws.split(2, dim=1):
            for chosen, change in self._changes(layer):
                if on_cpu:
                    _change_in_place(images, chosen, change, layer)
                else:
                    images = change_chosen(chosen, change, images, layer)
        return images

    def _changes(self, draws: Tensor) -> Iterator[tuple[Tensor, Change]]:
        """Every operation with the images [B] that draw it; those that move pixels count as one."""
        drawn = _operation(draws)
        yield (drawn >= _GEOMETRY.start) & (drawn < _GEOMETRY.stop), self._move
        colours = (
            self._brightness,
            self._color,
            self._contrast,
            self._sharpness,
            self._posterize,
            self._solarize,
            _autocontrast,
            _equalize,
        )
        for number, change in enumerate(colours, start=_GEOMETRY.stop):
            yield drawn == number, change

    def _move(self, images: Tensor, draws: Tensor) -> Tensor:
        side = images.shape[-1]
        maps = _inverse_maps(self.magnitude, self.bins, side, images.device)
        maps = maps[_operation(draws), (_sign(draws) > 0).long()]  # [B, 2, 3]
        centres = torch.arange(side, device=images.device) - (side - 1) / 2
        # Not a matrix product: a GPU may round its factors to TF32, a tenth of a pixel here. The order of the sums is
        # torchvision's, so that points half-way between two pixels fall to the same side.
        across, down = maps[..., :1] * centres, maps[..., 1:2] * centres  # [B, 2, S]
        grid = (across[:, :, None] + down[..., None]).add_(maps[..., 2:, None]).movedim(1, -1)  # [B, S, S, 2]
        moved = F.grid_sample(images, grid, mode=self.interpolation, align_corners=False)
        inside = F.grid_sample(torch.ones_like(images[:, :1]), grid, mode=self.interpolation, align_corners=False)
        return torch.lerp(moved.new_full((), self.fill), moved, inside)

    def _brightness(self, images: Tensor, draws: Tensor) -> Tensor:
        return (images * self._factor(draws)).clamp_(0, 1)

    def _color(self, images: Tensor, draws: Tensor) -> Tensor:
        return blend(images, grey(images), self._factor(draws))

    def _contrast(self, images: Tensor, draws: Tensor) -> Tensor:
        return blend(images, grey(images).mean((1, 2, 3), keepdim=True), self._factor(draws))

    def _sharpness(self, images: Tensor, draws: Tensor) -> Tensor:
        """Away from, or towards, a blur of 3 x 3 pixels with weight 5 in the centre; the border stays."""
        inner = images[:, :, 1:-1, 1:-1]
        rows = (images[:, :, :-2] + images[:, :, 1:-1]).add_(images[:, :, 2:])
        blurred = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(inner, alpha=4).div_(13)
        sharpened = images.clone()
        sharpened[:, :, 1:-1, 1:-1] = blend(inner, blurred, self._factor(draws))
        return sharpened

    def _posterize(self, images: Tensor, _: Tensor) -> Tensor:
        bits = round(8 - 4 * self.magnitude / (self.bins - 1))
        return _levels(images).bitwise_and_(256 - 2 ** (8 - bits)) / 255

    def _solarize(self, images: Tensor, _: Tensor) -> Tensor:
        # |1 - x| and |0 - x|: the bits of torch.where, which a CPU computes slowly.
        # A little lower, since stored values may equal the threshold, and float32 rounds the two apart.
        threshold = 1 - self.magnitude / (self.bins - 1) - 1e-6
        return torch.ge(images, threshold, out=torch.empty_like(images)).sub_(images).abs_()

    def _factor(self, draws: Tensor) -> Tensor:
        return (1 + _sign(draws) * _amount(0.0, 0.9, self.magnitude, self.bins))[:, None, None, None]


def _change_in_place(images: Tensor, chosen: Tensor, change: Change, draws: Tensor) -> None:
    at_once = max(1, _CACHED_VALUES // images[0].numel())
    for index in chosen.nonzero()[:, 0].split(at_once):
        if len(index):
            images.index_copy_(0, index, change(images[index], draws[index]))


def _operation(draws: Tensor) -> Tensor:
    """Index into `OPERATIONS`, int64 [B]."""
    return (draws[:, 0] * len(OPERATIONS)).long()


def _sign(draws: Tensor) -> Tensor:
    return torch.where(draws[:, 1] < 0.5, -1.0, 1.0)


def _amount(first: float, last: float, magnitude: int, bins: int) -> float:
    # In float32, as torchvision.
    return float(torch.linspace(first, last, bins)[magnitude])


@cache
def _inverse_maps(magnitude: int, bins: int, side: int, device: torch.device) -> Tensor:
    """The source of each pixel, by operation and sign (minus, plus): float32 [14, 2, 2, 3].

    The maps take offsets in pixels from the centre of the image to the coordinates of
    `grid_sample`; operations that move nothing keep them. Shears leave the first row or column where it is.
    """
    slope = _amount(0.0, 0.3, magnitude, bins)
    shift = 150 * side * magnitude // (331 * (bins - 1))  # in whole numbers: it may be one exactly
    angle = math.radians(_amount(0.0, 30.0, magnitude, bins))
    cos, sin = math.cos(angle), math.sin(angle)
    stay = [[1, 0, 0], [0, 1, 0]]

    def moves(sign: int) -> dict[str, list[list[float]]]:
        return {
            "shear_x": [[1, sign * slope, sign * slope * side / 2], [0, 1, 0]],
            "shear_y": [[1, 0, 0], [sign * slope, 1, sign * slope * side / 2]],
            "translate_x": [[1, 0, -sign * shift], [0, 1, 0]],
            "translate_y": [[1, 0, 0], [0, 1, -sign * shift]],
            "rotate": [[cos, -sign * sin, 0], [sign * sin, cos, 0]],
        }

    maps = torch.tensor([[moves(sign).get(name, stay) for sign in (-1, 1)] for name in OPERATIONS], dtype=torch.float64)
    return send(maps.float() / (side / 2), device)


def _levels(images: Tensor) -> Tensor:
    return (images * 255.999).to(torch.uint8)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to 0..1, unless it has one value only."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = low == high
    return ((images - torch.where(flat, 0.0, low)) / torch.where(flat, 1.0, high - low)).clamp_(0, 1)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Levels spread by their ranks in each channel, with the integer steps of Pillow's `ImageOps.equalize`."""
    levels = _levels(images).flatten(2).long()  # [B, C, S * S]
    one = torch.ones(1, dtype=torch.int32, device=images.device)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int32, device=images.device)
    up_to = counts.scatter_add_(2, levels, one.expand_as(levels)).cumsum(2)
    # Pixels below the highest level that occurs.
    below = torch.where(up_to < levels.shape[2], up_to, 0).amax(2, keepdim=True)
    step = below // 255
    before = F.pad(up_to[..., :-1], (1, 0))
    table = ((before + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return (table / 255).gather(2, levels).view_as(images)
