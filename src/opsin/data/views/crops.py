"""Geometry: the rectangle of an image that a view shows, and cutting it out.

A crop turns random numbers into boxes (vectorised over a batch); `cut` takes one box out of one
image, `cut_batch` a box out of each image of a batch, with equal pixels. So worker processes and
resident images give the same views. Boxes live on the CPU whatever the device of the images is:
their floating-point steps then give the same integers everywhere, and no check waits for a GPU,
which cuts by `resample.py`.

Shapes: B images, C channels, H and W sides of the source, S side of the crop, all in pixels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.clock import seeding

_SMALL_PIXELS = 64 * 64  # up to this size a CPU resizes images faster together


class Box(NamedTuple):
    """One of `Boxes`."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True, slots=True)
class Boxes:
    """Rectangles in pixels of the source image, int64 [B] each; may reach over the border."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor
    """bool [B]: mirror left to right after cutting."""

    @classmethod
    def of(cls, table: Tensor) -> "Boxes":
        """The boxes of an int64 `table` [5, B]."""
        top, left, height, width, flip = table.unbind(0)
        return cls(top, left, height, width, flip.bool())

    def table(self) -> Tensor:
        """The boxes in one tensor, int64 [5, B]."""
        return torch.stack([self.top, self.left, self.height, self.width, self.flip.long()])

    def one_by_one(self) -> Iterator[Box]:
        """Yield each box as plain numbers."""
        columns = (self.top, self.left, self.height, self.width, self.flip)
        return map(Box, *(column.tolist() for column in columns))

    def size(self) -> tuple[int, int] | None:
        """Height and width of all boxes; None if they differ."""
        height, width = int(self.height[0]), int(self.width[0])
        alike = bool(((self.height == height) & (self.width == width)).all())
        return (height, width) if alike else None

    def inside(self, tall: int, wide: int) -> bool:
        """True if no box reaches over the border of an image."""
        rows = (self.top >= 0) & (self.top + self.height <= tall)
        return bool((rows & (self.left >= 0) & (self.left + self.width <= wide)).all())


@dataclass(frozen=True, kw_only=True)
class Crop(ABC):
    """A rule for boxes. The cut is resized to `size` x `size` with antialiasing."""

    size: int
    count: int = 1
    """Number of independent crops of each image."""
    flip: Literal["none", "random", "alternate"] = "random"
    """`alternate` mirrors each image in every second epoch, beginning at random."""
    padding: Literal["zero", "reflect"] = "zero"
    """Pixels of a box outside the image: black, or the image mirrored."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    num_draws: ClassVar[int] = 0

    @abstractmethod
    def draw(self, heights: Tensor, widths: Tensor, draws: Tensor) -> Boxes:
        """Draw boxes without flip for images of the given sizes.

        `heights`, `widths` are int64 [B]; `draws` is float32 [B, num_draws] in [0, 1).
        """


@dataclass(frozen=True, kw_only=True)
class PadCrop(Crop):
    """A square as wide as the shorter side, anywhere over the image and a padded border.

    He et al. 2016, section 4.2. `padding_px` is measured in the crop: an image whose shorter side is
    not `size` is scaled to it, border included.
    """

    padding_px: int = 4
    num_draws: ClassVar[int] = 2

    def draw(self, heights: Tensor, widths: Tensor, draws: Tensor) -> Boxes:
        side = torch.minimum(heights, widths)
        border = torch.round(side.double() * self.padding_px / self.size).long()
        top = _below(heights - side + 2 * border + 1, draws[:, 0]) - border
        left = _below(widths - side + 2 * border + 1, draws[:, 1]) - border
        return _unflipped(top, left, side, side)


@dataclass(frozen=True, kw_only=True)
class WindowCrop(Crop):
    """A square of `size` pixels of the image, not resized, anywhere over the image and a padded border.

    An image of `size` pixels is cut as by `PadCrop`; of a larger one a part is seen, at the scale that it has.
    """

    padding_px: int = 0
    num_draws: ClassVar[int] = 2

    def draw(self, heights: Tensor, widths: Tensor, draws: Tensor) -> Boxes:
        side = torch.full_like(heights, self.size)
        top = _window_start(heights, self, draws[:, 0])
        left = _window_start(widths, self, draws[:, 1])
        return _unflipped(top, left, side, side)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(Crop):
    """A rectangle of random area and shape inside the image; Szegedy et al. 2015, section 6.

    `scale` is its share of the image's area, `ratio` its width over its height, drawn evenly on a
    logarithmic scale. The first of ten proposals that fits is taken, else the largest centred
    rectangle whose ratio is allowed.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    num_draws: ClassVar[int] = 22

    def draw(self, heights: Tensor, widths: Tensor, draws: Tensor) -> Boxes:
        height, width = rectangles(heights, widths, draws[:, 2:], scale=self.scale, ratio=self.ratio)
        found = height > 0
        largest_h = torch.round(widths.double() / self.ratio[0]).long().clamp(min=1)
        largest_w = torch.round(heights.double() * self.ratio[1]).long().clamp(min=1)
        height = torch.where(found, height, torch.minimum(heights, largest_h))
        width = torch.where(found, width, torch.minimum(widths, largest_w))
        top = torch.where(found, _below(heights - height + 1, draws[:, 0]), (heights - height) // 2)
        left = torch.where(found, _below(widths - width + 1, draws[:, 1]), (widths - width) // 2)
        return _unflipped(top, left, height, width)


@dataclass(frozen=True, kw_only=True)
class CenterCrop(Crop):
    """The central square that is `size` wide once the shorter side is scaled to `resize`."""

    resize: int

    def draw(self, heights: Tensor, widths: Tensor, draws: Tensor) -> Boxes:
        shorter = torch.minimum(heights, widths)
        side = torch.round(shorter.double() * self.size / self.resize).long().clamp(min=1)
        return _unflipped((heights - side) // 2, (widths - side) // 2, side, side)


@dataclass(frozen=True, kw_only=True)
class Squash(Crop):
    """The whole image, whatever its shape."""

    def draw(self, heights: Tensor, widths: Tensor, draws: Tensor) -> Boxes:
        return _unflipped(torch.zeros_like(heights), torch.zeros_like(widths), heights, widths)


def boxes_for(
    crop: Crop, heights: Tensor, widths: Tensor, *, seed: int, epoch: int, ids: Tensor, view: str, copy: int
) -> Boxes:
    """Return the boxes of one copy of a view: a function of these arguments and nothing else.

    `heights`, `widths`, `ids` are int64 [B] on the CPU.
    """
    stream = f"{view}.{copy}"
    boxes = crop.draw(heights, widths, seeding.uniform(seed, epoch, ids, f"{stream}.crop", crop.num_draws))
    if crop.flip == "none":
        return boxes
    # Epoch 0 stands for all epochs where mirroring alternates: the first turn is drawn once per image.
    drawn = seeding.uniform(seed, epoch if crop.flip == "random" else 0, ids, f"{stream}.flip", 1)[:, 0] < 0.5
    flip = drawn if crop.flip == "random" else drawn ^ (epoch % 2 == 1)
    return Boxes(boxes.top, boxes.left, boxes.height, boxes.width, flip)


def rectangles(
    heights: Tensor, widths: Tensor, draws: Tensor, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Height and width, int64 [B], of the first of ten random rectangles that fits; 0 where none fits.

    `draws` is [B, 20] in [0, 1); `scale` and `ratio` as in `RandomResizedCrop`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, :10].double())
    shape = torch.exp(low + (high - low) * draws[:, 10:].double())
    height = torch.round(torch.sqrt(area / shape)).long()  # [B, 10]
    width = torch.round(torch.sqrt(area * shape)).long()
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    found = fits.any(1)
    return torch.where(found, height.gather(1, first)[:, 0], 0), torch.where(found, width.gather(1, first)[:, 0], 0)


def cut(image: Tensor, box: Box, crop: Crop, *, interleaved: bool = False) -> Tensor:
    """Cut `box` out of `image` uint8 [C, H, W], resized and mirrored as `crop` says: uint8 [C, S, S].

    `interleaved` asks for the colours of a pixel side by side in memory: the kernel that resizes works that way, and
    would put them apart at almost the price of the resize.
    """
    top, left, height, width, flip = box
    if top >= 0 and left >= 0 and top + height <= image.shape[1] and left + width <= image.shape[2]:
        region = image[:, top : top + height, left : left + width]
    else:
        rows, row_inside = fold(torch.tensor([top]), height, image.shape[1])
        columns, column_inside = fold(torch.tensor([left]), width, image.shape[2])
        region = image[:, rows[0]][:, :, columns[0]]
        if crop.padding == "zero":
            region = region * (row_inside.T & column_inside)
    if (height, width) != (crop.size, crop.size):
        region = region[None].contiguous(memory_format=torch.channels_last) if interleaved else region[None]
        region = _resize(region, crop.size, crop.size, crop)[0]
    return region.flip(-1) if flip else region


def cut_batch(images: Tensor, boxes: Boxes, crop: Crop) -> Tensor:
    """Cut box i out of image i of `images` uint8 [B, C, H, W] on the CPU, for every i: uint8 [B, C, S, S].

    Equal to `cut` on each image: tests/unit/data/views/test_crops.py::test_both_executors_agree.
    """
    size = boxes.size()
    if size is not None:
        windows = cut_windows(images, boxes, boxes, size, crop)
        return windows if size == (crop.size, crop.size) else _resize(windows, crop.size, crop.size, crop)
    tall, wide = images.shape[2:]
    if tall * wide > _SMALL_PIXELS or not boxes.inside(tall, wide):
        return torch.stack([cut(image, box, crop) for image, box in zip(images, boxes.one_by_one(), strict=True)])
    # Columns, then rows, is what a resize of both does.
    pixels = images.permute(0, 2, 3, 1).contiguous()
    pixels = _resize_pieces(pixels, boxes.left, boxes.width, crop, axis="columns")
    pixels = _resize_pieces(pixels, boxes.top, boxes.height, crop, axis="rows")
    pixels = torch.where(boxes.flip[:, None, None, None], pixels.flip(2), pixels)
    return pixels.permute(0, 3, 1, 2).contiguous()


def cut_copies(images: Tensor, copies: Sequence[Boxes], crop: Crop) -> Tensor:
    """`cut_batch` for the boxes of each copy of a crop: uint8 [copies, B, C, S, S]."""
    views = [cut_batch(images, boxes, crop) for boxes in copies]
    return views[0][None] if len(views) == 1 else torch.stack(views)


def cut_windows(images: Tensor, boxes: Boxes, there: Boxes, size: tuple[int, int], crop: Crop) -> Tensor:
    """Boxes of one size [h, w] as they are, mirrored as asked: uint8 [B, C, h, w].

    `boxes` are on the CPU, and `there` the same ones on the device of the images.
    """
    count, channels, tall, wide = images.shape
    rows, row_inside = fold(there.top, size[0], tall)  # [B, h]
    columns, column_inside = fold(there.left, size[1], wide)
    flat, row_starts = images.flatten(2), rows * wide
    over = crop.padding == "zero" and not boxes.inside(tall, wide)
    if over:
        flat = F.pad(flat, (0, 1))  # one black pixel behind each image, for all that lies outside
        row_starts = torch.where(row_inside, row_starts, tall * wide)
        columns = torch.where(column_inside, columns, tall * wide)
    columns = torch.where(there.flip[:, None], columns.flip(1), columns)
    pixels = row_starts[:, :, None] + columns[:, None, :]  # [B, h, w]
    if over:
        pixels.clamp_(max=tall * wide)
    return flat.gather(2, pixels.view(count, 1, -1).expand(-1, channels, -1)).view(count, channels, *size)


def _window_start(sides: Tensor, crop: WindowCrop, draws: Tensor) -> Tensor:
    """The first pixel of the window along one axis; an image that is too small for it lies in its middle."""
    room = sides + 2 * crop.padding_px - crop.size
    return torch.where(room >= 0, _below(room + 1, draws) - crop.padding_px, (sides - crop.size) // 2)


def _below(limits: Tensor, draws: Tensor) -> Tensor:
    """Evenly drawn integers from 0 to `limits - 1`."""
    return (draws.double() * limits).long()


def _unflipped(top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Boxes:
    return Boxes(top, left, height, width, torch.zeros(len(top), dtype=torch.bool))


def fold(starts: Tensor, length: int, side: int) -> tuple[Tensor, Tensor]:
    """Source pixels [B, length] along one axis, mirrored at both borders, and which of them lie inside."""
    wanted = starts[:, None] + torch.arange(length, device=starts.device)
    period = max(2 * (side - 1), 1)
    folded = wanted.remainder(period)
    return torch.minimum(folded, period - folded).clamp(max=side - 1), (wanted >= 0) & (wanted < side)


def _resize_pieces(
    pixels: Tensor, starts: Tensor, lengths: Tensor, crop: Crop, *, axis: Literal["columns", "rows"]
) -> Tensor:
    """The piece of each image [B, H, W, C] along one axis that begins at `starts` [B], resized to S pixels.

    Pieces of one length go together: a resize costs more to begin than to do where images are small, and there
    are fewer lengths than pairs of height and width.
    """
    count, tall, wide, channels = pixels.shape
    if axis == "columns":
        step, shape = channels, (tall, crop.size)
        firsts = (torch.arange(count * tall) * wide).view(count, tall) + starts[:, None]
    else:
        step, shape = wide * channels, (crop.size, wide)
        firsts = (torch.arange(count) * tall + starts)[:, None]
    resized = pixels.new_empty(count, *shape, channels)
    for length in lengths.unique().tolist():
        index = (lengths == length).nonzero()[:, 0]
        # Every piece of this length in memory, one beginning at each step.
        pieces = pixels.as_strided((pixels.numel() // step - length + 1, length * step), (step, 1))
        found = pieces[firsts[index].flatten()]
        regions = found.view(len(index), -1, length if axis == "columns" else wide, channels)
        if length != crop.size:
            regions = _resize(regions.permute(0, 3, 1, 2), *shape, crop).permute(0, 2, 3, 1)
        resized[index] = regions
    return resized


def _resize(regions: Tensor, height: int, width: int, crop: Crop) -> Tensor:
    """uint8 [B, C, h, w] to [B, C, height, width]."""
    # The uint8 kernel computes in integers: the same pixels for any number of threads.
    return F.interpolate(regions, (height, width), mode=crop.interpolation, align_corners=False, antialias=True)
