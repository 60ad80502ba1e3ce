"""The picture of a learning-rate sweep."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opsin.errors import RunError
from opsin.tuning.lr_curve import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito (2008): colours that people with any colour vision tell apart.
_BLUE, _RED, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
_SIZE_INCHES = (7.2, 4.2)
_DOTS_PER_INCH = 160


def draw_curve(name: str, rates: Sequence[float], losses: Sequence[float], reading: Reading) -> bytes:
    """The curve as PNG: losses, smoothed loss, and what was read from it.

    Raises:
        RunError: matplotlib cannot be imported.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError(
            f"lr.png needs matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from error
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rates, losses, ".", color=_GREY, markersize=3, label="loss of one update")
    axes.plot(rates, reading.smoothed, color="black", linewidth=1.5, label="smoothed")
    _mark(axes, reading.steepest, _BLUE, ":", "steepest descent")
    _mark(axes, reading.safe, _RED, "--", "safe: a third of where it has risen")
    _mark(axes, reading.suggestion, _GREEN, "-", "suggestion")
    if reading.diverged is not None:
        axes.axvspan(reading.diverged, rates[-1], color=_RED, alpha=0.08, linewidth=0)
    axes.set_xscale("log")
    axes.set_ylim(*_limits(reading))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.spines[["top", "right"]].set_visible(False)
    if reading.suggestion is None:
        said = "no usable slope"
    else:
        said = f"optim.lr {reading.suggestion:g}: {reading.reason}"
    # A name may hold dollar signs, which would be read as a formula.
    axes.set_title(f"{name}: {said}", loc="left", fontsize=9, parse_math=False)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(file, format="png", dpi=_DOTS_PER_INCH)
    return file.getvalue()


def _mark(axes: "Axes", rate: float | None, color: str, style: str, what: str) -> None:
    if rate is not None:
        axes.axvline(rate, color=color, linestyle=style, linewidth=1.2, label=f"{what} ({rate:.2g})")


def _limits(reading: Reading) -> tuple[float, float]:
    """Room for the descent and the beginning of the rise; the runaway end would flatten all the rest."""
    if not reading.smoothed:
        return 0.0, 1.0
    low = min(reading.smoothed)
    high = reading.smoothed[0]
    margin = max(high - low, 6 * reading.noise, 1e-6)
    return low - 0.25 * margin, high + 0.6 * margin
