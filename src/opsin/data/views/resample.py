"""Views of images that lie on a GPU: all boxes are sent at once, and cut by products with filters.

Image after image would leave a GPU idle, and it would be waited for with each copy of its own.

Shapes: V views of an image (copies of one crop), B images, C channels, H and W sides of the source, S side of the
crop, all in pixels.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.data.transfer import send
from opsin.data.views.crops import Boxes, Crop, cut_windows, fold
from opsin.nn.exact import exact_products


def cut_views(images: Tensor, wanted: Sequence[tuple[Crop, Sequence[Boxes]]]) -> list[Tensor]:
    """Cut views out of `images` uint8 [B, C, H, W]: uint8 [V, B, C, S, S] for each crop and the boxes of its copies.

    Boxes are on the CPU. Resized views are computed in float: pixels differ by up to one from those of a CPU, by more
    where bicubic filters overshoot.
    """
    table = send(torch.stack([boxes.table() for _, copies in wanted for boxes in copies]), images.device)
    parts = table.split([len(copies) for _, copies in wanted])  # [V, 5, B] each
    return [_cut(images, crop, copies, sent) for (crop, copies), sent in zip(wanted, parts, strict=True)]


def _cut(images: Tensor, crop: Crop, copies: Sequence[Boxes], sent: Tensor) -> Tensor:
    size = (crop.size, crop.size)
    if all(boxes.size() == size for boxes in copies):
        pairs = zip(copies, sent.unbind(0), strict=True)
        return torch.stack([cut_windows(images, boxes, Boxes.of(there), size, crop) for boxes, there in pairs])
    return resample(images, copies, sent, crop)


def resample(images: Tensor, copies: Sequence[Boxes], sent: Tensor, crop: Crop) -> Tensor:
    """Views as products with matrices of filter weights; `sent` has the boxes of all copies, int64 [V, 5, B]."""
    tall, wide = images.shape[2:]
    top, left, height, width, flip = sent.transpose(0, 1).flatten(1).unbind(0)  # [V B] each
    rows = _filters(top, height, tall, _overhang(((one.top, one.height) for one in copies), tall), crop)
    columns = _filters(left, width, wide, _overhang(((one.left, one.width) for one in copies), wide), crop)
    columns = torch.where(flip.bool()[:, None, None], columns.flip(1), columns)
    pixels = images.float()
    with exact_products():
        views = [
            down[:, None] @ pixels @ across[:, None].mT
            for down, across in zip(rows.chunk(len(copies)), columns.chunk(len(copies)), strict=True)
        ]
    return torch.stack(views).round_().clamp_(0, 255).to(torch.uint8)


def _overhang(spans: Iterable[tuple[Tensor, Tensor]], side: int) -> int:
    """Pixels by which any box, a start and a length [B] along one axis, reaches over a border."""
    return max(max(int(-start.min()), int((start + length).max()) - side, 0) for start, length in spans)


def _filters(starts: Tensor, lengths: Tensor, side: int, overhang: int, crop: Crop) -> Tensor:
    """Weights [N, S, side] of the source pixels along one axis, as in antialiased interpolation."""
    starts, lengths = starts[:, None, None], lengths[:, None, None]
    scale = lengths / crop.size  # source pixels per pixel of the crop
    centers = (torch.arange(crop.size, device=starts.device)[:, None] + 0.5) * scale - 0.5  # [N, S, 1]
    # Pixels of the source and as many around it as boxes reach, counted from the start of each box.
    pixels = torch.arange(-overhang, side + overhang, device=starts.device) - starts  # [N, 1, side + 2 overhang]
    away = ((pixels - centers) / scale.clamp(min=1)).abs()
    if crop.interpolation == "bilinear":
        weights = (1 - away).clamp_(min=0)
    else:
        # Keys' cubic with a = -0.5, as Pillow and torch use where they antialias.
        near, far = (1.5 * away - 2.5) * away**2 + 1, ((2.5 - 0.5 * away) * away - 4) * away + 2
        weights = torch.where(away < 1, near, torch.where(away < 2, far, 0.0))
    weights = torch.where((pixels >= 0) & (pixels < lengths), weights, 0.0)
    weights = weights / weights.sum(2, keepdim=True)
    if not overhang:
        return weights
    with exact_products():
        return weights @ send(_folding(side, overhang, mirrored=crop.padding == "reflect"), weights.device)


def _folding(side: int, overhang: int, *, mirrored: bool) -> Tensor:
    """Weights, 0 or 1, of pixels in and around a source in its own pixels: float32 [side + 2 overhang, side]."""
    sources, inside = fold(torch.tensor([-overhang]), side + 2 * overhang, side)
    folding = F.one_hot(sources[0], side).float()
    return folding if mirrored else folding * inside.T
