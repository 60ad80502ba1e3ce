"""What all drawings share: an empty figure, its PNG, and colours. matplotlib is imported where it is used.

The canvas itself, not pyplot: no window, and no state that outlives the picture.
"""

import io
import warnings
from typing import TYPE_CHECKING

from opsin.errors import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008): eight colours that people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
BLUE, RED, GREEN = COLOURS[:3]


def new_figure(width: float, height: float, *, dots_per_inch: int = 160, constrained: bool = True) -> "Figure":
    """An empty figure of this size in inches; `constrained` finds room for labels by itself.

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


def to_png(figure: "Figure") -> bytes:
    """The figure as PNG, at its own resolution."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_figure(file, format="png", dpi=figure.dpi)
    return file.getvalue()
