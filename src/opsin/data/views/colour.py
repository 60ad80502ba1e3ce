"""Colour and erasing on whole batches, with random numbers of its own for every image.

Operations take and give float images [B, C, S, S] in 0..1 and are applied before normalisation. An
image that an operation skips keeps its bits. Draws are on the CPU: there an operation knows which images
it changes, also where they lie on a GPU that must not be waited for.

Shapes: B images, C channels (colour operations need three), S side in pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.data.transfer import send
from opsin.data.views.crops import rectangles

_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R BT.601, rounded as Pillow and torchvision do
_CACHED_VALUES = 1 << 19  # what a CPU changes at once, so that all operations of a view find it in a cache
_TILE = 16  # pixels that a CPU blurs by one product

Change = Callable[[Tensor, Tensor], Tensor]
"""Images [B, C, S, S] and their draws to changed images."""


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue, as torchvision's; SimCLR, Chen et al. 2020.

    A strength s draws a factor from max(0, 1 - s) to 1 + s; `hue` draws a shift from -hue to hue, in
    turns of the colour circle (0.5 at most). The four come in this order for every image, where the
    published code shuffles them: the order matters only where values are clipped.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0
    num_draws: ClassVar[int] = 5

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return change_chosen(draws[:, 0] < self.p, self._jitter, images, draws)

    def _jitter(self, images: Tensor, draws: Tensor) -> Tensor:
        if self.brightness:
            images = (images * _factor(self.brightness, draws[:, 1])).clamp_(0, 1)
        if self.contrast:
            mean = grey(images.mean((2, 3), keepdim=True))  # the mean of grey, in one pass
            images = blend(images, mean, _factor(self.contrast, draws[:, 2]))
        if self.saturation:
            images = blend(images, grey(images), _factor(self.saturation, draws[:, 3]))
        if self.hue:
            images = _turn_hue(images, (draws[:, 4] * 2 - 1) * self.hue)
        return images


@dataclass(frozen=True)
class Grayscale:
    """All three channels show the luminance, with probability `p`."""

    p: float = 0.2
    num_draws: ClassVar[int] = 1

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return change_chosen(draws[:, 0] < self.p, self._show_grey, images, draws)

    def _show_grey(self, images: Tensor, _: Tensor) -> Tensor:
        return grey(images).expand_as(images)


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with probability `p`; the width is drawn evenly from `sigma`, in pixels.

    The kernel reaches three times the largest width; borders are mirrored.
    """

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    num_draws: ClassVar[int] = 2

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        # Matrices of other sides lie in memory in ways that the order of sums may depend on.
        multiply = images.device.type == "cpu" and images.shape[-1] % _TILE == 0
        return change_chosen(draws[:, 0] < self.p, self._multiply if multiply else self._convolve, images, draws)

    def radius(self, side: int) -> int:
        """Reach of the kernel in pixels, in an image of `side` pixels."""
        return min(math.ceil(3 * self.sigma[1]), side - 1)

    def _kernels(self, draws: Tensor, reach: int) -> Tensor:
        """Weights at -reach to reach pixels, adding to 1: [B, K]."""
        widths = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * draws[:, 1]
        offsets = torch.arange(-reach, reach + 1, device=draws.device)
        return torch.softmax(-0.5 * (offsets / widths[:, None]) ** 2, dim=1)

    def _convolve(self, images: Tensor, draws: Tensor) -> Tensor:
        count, channels, side, _ = images.shape
        reach = self.radius(side)
        kernels = self._kernels(draws, reach).repeat_interleave(channels, 0)[:, None]  # [B C, 1, K]
        # Every channel of every image is a group of its own, so that each image has its own kernel.
        planes = F.pad(images, (reach,) * 4, mode="reflect").view(1, count * channels, side + 2 * reach, -1)
        planes = F.conv2d(planes, kernels[:, :, None, :], groups=count * channels)
        planes = F.conv2d(planes, kernels[:, :, :, None], groups=count * channels)
        return planes.view(images.shape)

    def _multiply(self, images: Tensor, draws: Tensor) -> Tensor:
        # A convolution of some channels out of many sizes is fast or slow on a CPU by chance, products never are.
        count, channels, side, _ = images.shape
        reach = self.radius(side)
        blur = _band(self._kernels(draws, reach), side, reach)  # [B, S, S]
        tiles = [
            (slice(first, first + _TILE), slice(max(0, first - reach), first + _TILE + reach))
            for first in range(0, side, _TILE)
        ]
        pixels, across = images.reshape(count, channels * side, side), blur.transpose(1, 2)
        pixels = torch.cat([pixels[:, :, near] @ across[:, near, tile] for tile, near in tiles], 2)
        planes, down = pixels.view(-1, side, side), blur.repeat_interleave(channels, 0)  # [B C, S, S]
        return torch.cat([down[:, tile, near] @ planes[:, near] for tile, near in tiles], 1).view(images.shape)


@dataclass(frozen=True)
class Solarize:
    """Values from `threshold` on are inverted, with probability `p`."""

    p: float = 0.2
    threshold: float = 0.5
    num_draws: ClassVar[int] = 1

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return change_chosen(draws[:, 0] < self.p, self._solarize, images, draws)

    def _solarize(self, images: Tensor, _: Tensor) -> Tensor:
        # |1 - x| and |0 - x|: the bits of torch.where, which a CPU computes slowly.
        return torch.ge(images, self.threshold, out=torch.empty_like(images)).sub_(images).abs_()


@dataclass(frozen=True)
class RandomErasing:
    """A rectangle is filled, with probability `p`; Zhong et al. 2020.

    `scale` is its share of the area, `ratio` its width over its height. The default `fill` is mid-grey,
    which normalisation brings near 0.
    """

    p: float = 0.25
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: float = 0.5
    num_draws: ClassVar[int] = 23

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        sides = torch.full((len(images),), images.shape[-1])
        height, width = rectangles(sides, sides, draws[:, 3:], scale=self.scale, ratio=self.ratio)
        top = (draws[:, 1] * (sides - height + 1)).long()
        left = (draws[:, 2] * (sides - width + 1)).long()
        return _fill(images, top, left, torch.where(draws[:, 0] < self.p, height, 0), width, self.fill)


@dataclass(frozen=True)
class Cutout:
    """A square of `size_px` around a random pixel is filled, less what lies outside; DeVries and Taylor 2017."""

    size_px: int
    fill: float = 0.5
    num_draws: ClassVar[int] = 2

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        corners = (draws * images.shape[-1]).long() - self.size_px // 2  # [B, 2]
        size = torch.full_like(corners[:, 0], self.size_px)
        return _fill(images, corners[:, 0], corners[:, 1], size, size, self.fill)


class Normalize:
    """Channels with the given mean and standard deviation become 0 and 1; float32.

    Multiplication and addition are two operations on purpose: each rounds once, so that the bits
    depend neither on the memory format nor on the device.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], *, device: torch.device) -> None:
        deviation = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        offset = -torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1) / deviation
        self._scale = (1 / deviation).float().to(device)
        self._byte_scale = (1 / (255 * deviation)).float().to(device)
        self._offset = offset.float().to(device)

    def __call__(self, images: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Of float images in 0..1 with shape [..., C, S, S]; written to `out` where it is given."""
        return torch.mul(images, self._scale, out=out).add_(self._offset)

    def bytes(self, images: Tensor) -> Tensor:
        """Of uint8 images with shape [..., C, S, S]."""
        return images.float().mul_(self._byte_scale).add_(self._offset)


def num_cached(images: Tensor) -> int:
    """Number of `images` [B, C, S, S] that should go through all operations together: few on a CPU."""
    return max(1, _CACHED_VALUES // images[0].numel()) if images.device.type == "cpu" else len(images)


def change_chosen(chosen: Tensor, change: Change, images: Tensor, draws: Tensor) -> Tensor:
    """Return `change(images, draws)` for the chosen images, bool [B] on the CPU, and the others as they are.

    `change` gets the draws on the device of the images.
    """
    index, device = chosen.nonzero()[:, 0], images.device
    if len(index) == 0:
        return images
    if len(index) == len(images):
        return change(images, send(draws, device))
    numbers = send(draws.index_select(0, index), device)
    if device.type == "cpu":
        return images.index_copy(0, index, change(images.index_select(0, index), numbers))
    # Not by index_copy: where results must repeat, a GPU sorts the index first. It gathers without a sort.
    taken, order = send(torch.cat([index, exchange(index, len(images))]), device).tensor_split([len(index)])
    return torch.cat([images, change(images.index_select(0, taken), numbers)]).index_select(0, order)


def exchange(index: Tensor, count: int) -> Tensor:
    """Rows, int64 [count], of `count` old rows followed by new ones that replace the rows `index`."""
    order = torch.arange(count)
    order[index] = count + torch.arange(len(index))
    return order


def _factor(strength: float, draws: Tensor) -> Tensor:
    low, high = max(0.0, 1 - strength), 1 + strength
    return (low + (high - low) * draws)[:, None, None, None]


def blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """`share` of the images and the rest of `other`, cut to 0..1; a share above 1 leads away from `other`."""
    return (images * share).add_(other * (1 - share)).clamp_(0, 1)


def grey(images: Tensor) -> Tensor:
    """Luminance of images [B, 3, S, S]: [B, 1, S, S]."""
    red, green, blue = images.unbind(1)
    shown = (red * _GREY_WEIGHTS[0]).add_(green * _GREY_WEIGHTS[1]).add_(blue * _GREY_WEIGHTS[2])
    return shown[:, None]


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """The hue of HSV moved by `turns` [B] of the colour circle.

    For one pixel, with the hue as an angle from red in sixths of the circle, -3 to 3:

        chroma = max(r, g, b) - min(r, g, b)
        angle = hue + 6 * turns
        for each channel with its colour at 0 (red), 2 (green), -2 (blue):
            away = distance on the circle between angle and colour, 0 to 3
            value = min(r, g, b) + chroma * clamp(2 - away, 0, 1)

    Angles are kept multiplied by chroma, which takes neither a division nor a choice for each pixel.
    """
    red, green, blue = images.split(1, dim=1)  # [B, 1, S, S] each
    low = torch.minimum(red, green).minimum(blue)
    high = torch.maximum(red, green).maximum(blue)
    chroma = high - low
    # The distance from red is (green + blue - red + high - 2 low) / chroma, whichever channel is the highest.
    angle = (green + blue).sub_(red).add_(high).sub_(low * 2).copysign_(green - blue)
    colours = torch.arange(3, device=images.device) * 2
    moves = (6 * turns[:, None] - colours + 3).remainder(6) - 3  # [B, 3] in -3..3
    away = (chroma * moves[:, :, None, None]).add_(angle).abs_()  # 0 to 6: not yet the shorter way round
    # The shorter way is 3 - |3 - away|, so that |3 - away| - 1 is cut to 0..1.
    away = away.sub_(chroma * 3).abs_().clamp_(chroma, chroma * 2)
    return away.add_(low - chroma)


def _band(kernels: Tensor, side: int, reach: int) -> Tensor:
    """Matrices [B, S, S] whose product with a column of pixels is its convolution, mirrored at both ends.

    `kernels` is [B, 2 reach + 1].
    """
    wide = side + 2 * reach
    # In rows that are one value longer, the same value is one column further left in each next row.
    band = F.pad(kernels, (0, wide + 1 - kernels.shape[1])).repeat(1, side)[:, : side * wide].view(-1, side, wide)
    inner = band[:, :, reach : reach + side].clone()
    inner[:, :, 1 : reach + 1] += band[:, :, :reach].flip(2)
    inner[:, :, side - 1 - reach : side - 1] += band[:, :, reach + side :].flip(2)
    return inner


def _fill(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, value: float) -> Tensor:
    """A copy with one rectangle of each image, int64 [B] on the CPU, set to `value`."""
    bounds = send(torch.stack([top, top + height, left, left + width]), images.device)[..., None]  # [4, B, 1]
    pixels = torch.arange(images.shape[-1], device=images.device)
    rows = (pixels >= bounds[0]) & (pixels < bounds[1])
    columns = (pixels >= bounds[2]) & (pixels < bounds[3])
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], value)
