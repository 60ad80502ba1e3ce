"""The picture of a learning-rate sweep."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opsin.reporting.style import BLUE, GREEN, RED, new_figure, to_png
from opsin.tuning.lr_curve import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY = "#8A8A8A"


def draw_curve(name: str, rates: Sequence[float], losses: Sequence[float], reading: Reading) -> bytes:
    """The curve as PNG: losses, smoothed loss, and what was read from it.

    Raises:
        RunError: matplotlib cannot be imported.
    """
    figure = new_figure(7.2, 4.2)
    axes = figure.add_subplot()
    axes.plot(rates, losses, ".", color=_GREY, markersize=3, label="loss of one update")
    axes.plot(rates, reading.smoothed, color="black", linewidth=1.5, label="smoothed")
    _mark(axes, reading.steepest, BLUE, ":", "steepest descent")
    _mark(axes, reading.safe, RED, "--", "safe: a third of where it has risen")
    _mark(axes, reading.suggestion, GREEN, "-", "suggestion")
    if reading.diverged is not None:
        axes.axvspan(reading.diverged, rates[-1], color=RED, alpha=0.08, linewidth=0)
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
    return to_png(figure)


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
