"""Pictures of a set of images: samples of each class, sizes, and copies side by side. PNG, as bytes.

Shapes: R rows and K columns of a grid of cells, S side of a cell in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from opsin.clock import seeding
from opsin.data.base import UnreadableImage
from opsin.data.curation.collection import Collection
from opsin.data.curation.duplicates import Groups
from opsin.data.curation.scan import Scan
from opsin.reporting.style import BLUE, Pixels, new_figure, pixel_grid, to_png

MAX_PAIRS = 12
"""The largest number of pairs of copies in a picture."""

_CELL_PX = 96
_GAP_PX = 4
_COLUMNS = 8
_MAX_CLASSES = 12
_LETTERS = 24
_MAX_POINTS = 20_000


def draw_samples(collection: Collection, scan: Scan) -> bytes:
    """Draw eight images of each class, at random but always the same; of many classes, twelve spread over all."""
    labels = np.where(scan.readable, collection.labels.numpy(), -2)
    present = [label for label in np.unique(labels).tolist() if label >= -1]
    chosen = [present[i] for i in np.linspace(0, len(present) - 1, min(_MAX_CLASSES, len(present))).astype(int)]
    draws = seeding.uniform(0, 0, torch.arange(len(labels)), "samples", 1)[:, 0].numpy()
    rows: list[list[int]] = []
    names: list[str] = []
    for label in chosen:
        members = np.flatnonzero(labels == label)
        count = _COLUMNS if len(chosen) > 1 else _COLUMNS * _COLUMNS
        picked = np.sort(members[np.argsort(draws[members], kind="stable")[:count]]).tolist()
        pieces = [picked[first : first + _COLUMNS] for first in range(0, len(picked), _COLUMNS)]
        rows += pieces
        names += [f"{_short(collection.class_name(label))}\n{len(members):,}", *[""] * (len(pieces) - 1)]
    return _draw_grid([[_cell(collection, index) for index in row] for row in rows], row_names=names)


def draw_pairs(collection: Collection, pairs: Sequence[tuple[int, int]]) -> bytes:
    """Draw pairs of copies, one image above the other, numbered from 1."""
    cells = [[_cell(collection, pair[row]) for pair in pairs] for row in (0, 1)]
    return _draw_grid(cells, column_names=[str(number) for number in range(1, len(pairs) + 1)])


def choose_pairs(collection: Collection, scan: Scan, groups: Groups) -> list[tuple[int, int]]:
    """Return two images of each of the first groups: those across splits first, then those with different pixels."""
    split_numbers = collection.split_numbers.numpy()
    pairs: list[tuple[bool, bool, int, int]] = []
    for members in groups.shared:
        first, *others = members.tolist()
        crossing = [other for other in others if split_numbers[other] != split_numbers[first]]
        other = (crossing or others)[0]
        pairs.append((not crossing, bool(scan.exact[first] == scan.exact[other]), first, other))
    return [(first, other) for *_, first, other in sorted(pairs)[:MAX_PAIRS]]


def draw_sizes(scan: Scan) -> bytes:
    """Draw widths against heights, and a histogram of aspects."""
    figure = new_figure(9.0, 3.6, dots_per_inch=100)
    sizes = scan.sizes[scan.readable]
    step = -(-len(sizes) // _MAX_POINTS)
    heights, widths = sizes[::step].T.astype(np.float64)
    points, bars = figure.subplots(1, 2)
    points.scatter(widths, heights, s=8, alpha=0.3, color=BLUE, linewidths=0)
    points.set(xlabel="width in pixels", ylabel="height in pixels", title="sizes")
    points.set_xlim(left=0)
    points.set_ylim(bottom=0)
    bars.hist(np.log2(widths / heights), bins=40, color=BLUE)
    low, high = bars.get_xlim()
    ticks = [tick for tick in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8) if low <= np.log2(tick) <= high]
    bars.set_xticks(np.log2(ticks), [f"1:{1 / tick:g}" if tick < 1 else f"{tick:g}:1" for tick in ticks])
    bars.set(xlabel="width : height", ylabel="images", title="aspect")
    for axes in (points, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def _draw_grid(
    cells: Sequence[Sequence[Pixels]], *, row_names: Sequence[str] = (), column_names: Sequence[str] = ()
) -> bytes:
    """Draw cells [R][K], each uint8 [S, S, 3], with names left of rows or above columns."""
    left, top = 180 if row_names else 10, 24 if column_names else 10
    figure, axes = pixel_grid(cells, gap=_GAP_PX, left=left, top=top)
    middle, step = _CELL_PX / 2, _CELL_PX + _GAP_PX
    # Class names may hold a dollar sign, which would begin a formula.
    for row, name in enumerate(row_names):
        axes.text(left - 10, top + row * step + middle, name, ha="right", va="center", fontsize=10, parse_math=False)
    for column, name in enumerate(column_names):
        axes.text(left + column * step + middle, top - 6, name, ha="center", va="bottom", fontsize=10)
    return to_png(figure)


def _cell(collection: Collection, index: int) -> Pixels:
    """Return an image inside a white square [S, S, 3]; only white if it has disappeared meanwhile."""
    cell = np.full((_CELL_PX, _CELL_PX, 3), 255, dtype=np.uint8)
    try:
        image = Image.fromarray(collection.read(index).permute(1, 2, 0).contiguous().numpy())
    except UnreadableImage:
        return cell
    scale = _CELL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Small images keep their pixels visible.
    small = np.asarray(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS))
    top, left = (_CELL_PX - size[1]) // 2, (_CELL_PX - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = small
    return cell


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
