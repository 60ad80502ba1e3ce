"""Colour and erasing on whole batches, with random numbers of its own for every image.

Operations take and give float images [B, C, S, S] in 0..1 and are applied before normalisation. An
image that an operation passes over keeps its bits.

Shapes: B images, C channels (colour operations need three), S side in pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.data.crops import rectangles

_GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R BT.601, rounded as Pillow and torchvision do


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
        return _where(draws[:, 0] < self.p, self._jitter, images, draws)

    def _jitter(self, images: Tensor, draws: Tensor) -> Tensor:
        if self.brightness:
            images = (images * _factor(self.brightness, draws[:, 1])).clamp_(0, 1)
        if self.contrast:
            mean = grey(images).mean((1, 2, 3), keepdim=True)
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
        return _where(draws[:, 0] < self.p, lambda chosen, _: grey(chosen).expand_as(chosen), images, draws)


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with probability `p`; the width is drawn evenly from `sigma`, in pixels.

    The kernel reaches three times the largest width; borders are mirrored.
    """

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    num_draws: ClassVar[int] = 2

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return _where(draws[:, 0] < self.p, self._blur, images, draws)

    def radius(self, side: int) -> int:
        """Reach of the kernel in pixels, in an image of `side` pixels."""
        return min(math.ceil(3 * self.sigma[1]), side - 1)

    def _blur(self, images: Tensor, draws: Tensor) -> Tensor:
        count, channels, side, _ = images.shape
        reach = self.radius(side)
        widths = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * draws[:, 1]
        offsets = torch.arange(-reach, reach + 1, device=images.device)
        kernels = torch.softmax(-0.5 * (offsets / widths[:, None]) ** 2, dim=1)  # [B, K]
        kernels = kernels.repeat_interleave(channels, 0)[:, None]  # [B C, 1, K]
        # Every channel of every image is a group of its own, so that each image has its own kernel.
        planes = F.pad(images, (reach,) * 4, mode="reflect").view(1, count * channels, side + 2 * reach, -1)
        planes = F.conv2d(planes, kernels[:, :, None, :], groups=count * channels)
        planes = F.conv2d(planes, kernels[:, :, :, None], groups=count * channels)
        return planes.view(images.shape)


@dataclass(frozen=True)
class Solarize:
    """Values from `threshold` on are inverted, with probability `p`."""

    p: float = 0.2
    threshold: float = 0.5
    num_draws: ClassVar[int] = 1

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return _where(draws[:, 0] < self.p, self._solarize, images, draws)

    def _solarize(self, images: Tensor, _: Tensor) -> Tensor:
        return torch.where(images >= self.threshold, 1 - images, images)


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
        sides = torch.full((len(images),), images.shape[-1], device=images.device)
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

    def __call__(self, images: Tensor) -> Tensor:
        """Of float images in 0..1 with shape [..., C, S, S]."""
        return (images * self._scale).add_(self._offset)

    def bytes(self, images: Tensor) -> Tensor:
        """Of uint8 images with shape [..., C, S, S]."""
        return images.float().mul_(self._byte_scale).add_(self._offset)


def _where(chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor], images: Tensor, draws: Tensor) -> Tensor:
    """`change(images, draws)` for the chosen images [B], the others as they are."""
    if images.device.type != "cpu":
        # Counting the chosen would wait for the device; there, computing all of them is cheaper.
        return torch.where(chosen[:, None, None, None], change(images, draws), images)
    index = chosen.nonzero()[:, 0]
    if len(index) == len(images):
        return change(images, draws)
    return images.index_copy(0, index, change(images[index], draws[index])) if len(index) else images


def _factor(strength: float, draws: Tensor) -> Tensor:
    low, high = max(0.0, 1 - strength), 1 + strength
    return (low + (high - low) * draws)[:, None, None, None]


def blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """`share` of the images and the rest of `other`, cut to 0..1; a share above 1 leads away from `other`."""
    return (images * share + other * (1 - share)).clamp_(0, 1)


def grey(images: Tensor) -> Tensor:
    """Luminance of images [B, 3, S, S]: [B, 1, S, S]."""
    red, green, blue = images.unbind(1)
    return (red * _GREY_WEIGHTS[0] + green * _GREY_WEIGHTS[1] + blue * _GREY_WEIGHTS[2])[:, None]


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """The hue of HSV moved by `turns` [B] of the colour circle."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    sector = torch.where(
        value == red,
        (green - blue) / chroma,
        torch.where(value == green, 2 + (blue - red) / chroma, 4 + (red - green) / chroma),
    )
    sector = torch.where(chroma > 0, sector, 0.0) + 6 * turns[:, None, None]
    # Each channel falls from `value` by `chroma` where the hue is more than a sixth away from its own colour.
    away = [(sector + start).remainder_(6) for start in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) for k in away], 1)


def _fill(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, value: float) -> Tensor:
    """A copy with one rectangle [B] of each image set to `value`."""
    pixels = torch.arange(images.shape[-1], device=images.device)
    rows = (pixels >= top[:, None]) & (pixels < (top + height)[:, None])
    columns = (pixels >= left[:, None]) & (pixels < (left + width)[:, None])
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], value)
