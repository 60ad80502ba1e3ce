"""Parts of all drawings: an empty figure, its PNG, and colours. matplotlib is imported where it is used.

The canvas itself, not pyplot: no window, and no state that outlives the picture.
"""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opsin.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels = np.ndarray[Any, np.dtype[np.uint8]] | np.ndarray[Any, np.dtype[np.float32]]
"""Colours [H, W, 3] in 0..255 or in 0..1."""

# Okabe and Ito (2008): eight colours that people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
BLUE, RED, GREEN = COLOURS[:3]


def new_figure(width: float, height: float, *, dots_per_inch: int = 160, constrained: bool = True) -> "Figure":
    """An empty figure of this size in inches; `constrained` makes room for labels.

    Raises:
        RunError: matplotlib cannot be imported.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError(
            f"pictures need matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from error
    return Figure(figsize=(width, height), dpi=dots_per_inch, layout="constrained" if constrained else None)


def pixel_grid(rows: Sequence[Sequence[Pixels]], *, gap: int, left: int, top: int) -> "tuple[Figure, Axes]":
    """A white figure with square cells of equal size, pixel by pixel, `gap` pixels apart.

    `left` and `top` are the margins for text in pixels, as the axes count them. One picture is drawn, since a hundred
    axes would take matplotlib seconds.
    """
    side, kind = len(rows[0][0]), rows[0][0].dtype
    step = side + gap
    height, width = top + len(rows) * step, left + max(map(len, rows)) * step
    canvas = np.full((height, width, 3), 255 if kind == np.uint8 else 1, dtype=kind)
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            canvas[top + row * step :, left + column * step :][:side, :side] = cell
    figure = new_figure(width / 100, height / 100, dots_per_inch=100, constrained=False)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(canvas, interpolation="nearest", extent=(0, width, height, 0))
    return figure, axes


def to_png(figure: "Figure") -> bytes:
    """The figure as PNG, at its own resolution."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=figure.dpi)
    return file.getvalue()
