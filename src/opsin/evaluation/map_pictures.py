"""Drawings of masks over images, of errors by cell, and of attention: one row for each image.

Shapes: B images, S side in pixels, P side of a panel in pixels, n x n cells of a grid, N patches, H heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.reporting.style import COLOURS, pixel_grid, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pixels = np.ndarray[Any, np.dtype[np.float32]]

_PANEL_PX, _GAP_PX, _HEAD_PX = 128, 6, 34
_TEXT = 6.5
_UNSEEN, _NOWHERE = 0.85, 0.75
"""Grey of unseen patches, and of cells without a number."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The patches that a mask shows, and the blocks that it hides."""

    seen: Tensor
    """bool [n, n]: the patches of the context."""
    cells: Sequence[Sequence[Sequence[int]]]
    """Of each level and each target block the cells, row by row on the level's grid."""
    across: Sequence[int]
    """n of each level."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A square of a picture, and the outlines over it."""

    pixels: Pixels
    """[P, P, 3]"""
    outlines: Sequence["Outline"] = ()


@dataclass(frozen=True, slots=True)
class Outline:
    """A rectangle in shares of the panel."""

    left: float
    top: float
    width: float
    height: float
    colour: str
    thick: bool


@dataclass(frozen=True, slots=True)
class Column:
    """A title over panels, one for each image."""

    title: str
    panels: Sequence[Panel]


def draw_predictions(images: Tensor, blocks: Sequence[Blocks], errors: Sequence[Tensor]) -> bytes:
    """Images [B, C, S, S] in 0..1; on each level one of the masks, and the errors [B, n, n]: as PNG."""
    chosen = [blocks[row % len(blocks)] for row in range(len(images))]
    columns = [Column("image", [Panel(panel_of(image)) for image in images])]
    for level, found in enumerate(errors):
        across = chosen[0].across[level]
        masked = [
            Panel(panel_of(shade(image, mask.seen)), outlines(mask.cells[level], across))
            for image, mask in zip(images, chosen, strict=True)
        ]
        columns.append(Column(f"level {level}: {across} x {across}\ncontext and targets", masked))
        low, high = float(found.nan_to_num(math.inf).min()), float(found.nan_to_num(-math.inf).max())
        title = f"error, level {level}\n{low:.3f} dark, {high:.3f} bright"
        columns.append(Column(title, [Panel(heat(grid, low, high)) for grid in found]))
    return draw_columns(columns)


def draw_attention(images: Tensor, attention: Tensor) -> bytes:
    """Images [B, C, S, S] in 0..1, and the attention of each head to each patch, [B, H, N]: as PNG."""
    columns = [Column("image", [Panel(panel_of(image)) for image in images])]
    side = math.isqrt(attention.shape[-1])
    grids = attention.unflatten(2, (side, side))
    for head, found in enumerate(grids.unbind(1)):
        # Each panel has a scale of its own: heads differ more than patches do.
        panels = [Panel(heat(grid, 0.0, float(grid.max()))) for grid in found]
        columns.append(Column(f"attention\nhead {head}", panels))
    return draw_columns(columns)


def shade(image: Tensor, seen: Tensor) -> Tensor:
    """The image [C, S, S] with all but the patches `seen` [n, n] greyed."""
    shown = seen.repeat_interleave(image.shape[1] // len(seen), 0).repeat_interleave(image.shape[2] // len(seen), 1)
    faint = _UNSEEN * 0.7 + image.mean(0, keepdim=True).expand_as(image) * 0.3
    return torch.where(shown, image, faint)


def outlines(blocks: Sequence[Sequence[int]], across: int) -> list[Outline]:
    """Thin lines around each cell of the blocks, thick ones around each block, which are rectangles."""
    found: list[Outline] = []
    size = 1 / across
    for number, cells in enumerate(blocks):
        colour = COLOURS[(number + 1) % len(COLOURS)]
        rows, columns = [cell // across for cell in cells], [cell % across for cell in cells]
        found += [
            Outline(column * size, row * size, size, size, colour, thick=False)
            for row, column in zip(rows, columns, strict=True)
        ]
        width, height = max(columns) + 1 - min(columns), max(rows) + 1 - min(rows)
        found.append(Outline(min(columns) * size, min(rows) * size, width * size, height * size, colour, thick=True))
    return found


def panel_of(image: Tensor) -> Pixels:
    """An image [C, S, S] in 0..1 as the pixels of a panel [P, P, 3]; small ones keep their pixels."""
    coloured = image.expand(3, -1, -1)[None]
    if image.shape[-1] > _PANEL_PX:
        coloured = F.interpolate(coloured, (_PANEL_PX, _PANEL_PX), mode="bilinear", antialias=True)
    else:
        coloured = F.interpolate(coloured, (_PANEL_PX, _PANEL_PX), mode="nearest-exact")
    pixels: Pixels = coloured[0].permute(1, 2, 0).clamp(0, 1).numpy()
    return pixels


def heat(grid: Tensor, low: float, high: float) -> Pixels:
    """Numbers [n, n] as colours from `low` to `high`; grey where there is none."""
    from matplotlib import colormaps

    shares = ((grid - low) / max(high - low, 1e-12)).nan_to_num(0.0).clamp(0, 1)
    colours = torch.from_numpy(colormaps["inferno"](shares.numpy())[..., :3].astype(np.float32))
    colours[grid.isnan()] = _NOWHERE
    return panel_of(colours.permute(2, 0, 1))


def draw_columns(columns: Sequence[Column]) -> bytes:
    """All columns beside each other, as PNG."""
    rows = zip(*([panel.pixels for panel in column.panels] for column in columns), strict=True)
    figure, axes = pixel_grid(list(rows), gap=_GAP_PX, left=0, top=_HEAD_PX)
    step = _PANEL_PX + _GAP_PX
    for index, column in enumerate(columns):
        axes.text(index * step, _HEAD_PX - 4, column.title, fontsize=_TEXT, va="bottom", parse_math=False)
        for row, panel in enumerate(column.panels):
            _draw_outlines(axes, panel.outlines, index * step, _HEAD_PX + row * step)
    return to_png(figure)


def _draw_outlines(axes: "Axes", found: Sequence[Outline], left: int, top: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    found = sorted(found, key=lambda outline: outline.thick)  # the thick ones over the thin ones
    rectangles = [
        Rectangle(
            (left + one.left * _PANEL_PX, top + one.top * _PANEL_PX), one.width * _PANEL_PX, one.height * _PANEL_PX
        )
        for one in found
    ]
    colours, widths = [one.colour for one in found], [1.4 if one.thick else 0.4 for one in found]
    axes.add_collection(PatchCollection(rectangles, facecolor="none", edgecolor=colours, linewidth=widths, zorder=3))
