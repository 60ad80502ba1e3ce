"""The curve of a learning-rate sweep: its reading, which is a pure function of rates and losses, and its picture.

Smith 2017, "Cyclical learning rates for training neural networks", section 3.3, proposes the sweep and leaves the
reading to the eye. Here it is a rule: the suggestion is the rate at which the steep descent ends
(`benchmarks/lr_finder.py` compares it with grids).

Shapes: N updates of a sweep.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from opsin.reporting.style import BLUE, GREEN, RED, new_figure, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

DIVERGED_AT = 4.0
"""Ratio of the mean loss to its lowest value that ends a sweep."""
FEWEST_STEPS = 20
"""A shorter sweep has no curve to read."""

# The moving mean that shows divergence remembers about ten updates.
_MEMORY = 0.9
_WIDTHS_IN_SWEEP = 25
_BEGINNINGS_IN_SWEEP = 20
# Spreads of the noise above which a fall is clear. Measured with 200 updates: below 1.5 where a network did not
# learn (a vision transformer on digits with SGD), 5 or more where one did.
_CLEAR_FALL = 4.0
# The descent has ended when this share of the fall is made and the slope is this share of the steepest.
_MOST = 0.7
_FLAT = 0.25
# The loss has clearly risen this share of the fall above the valley; a safe rate keeps this factor away from there.
_RISEN = 0.25
_DISTANCE = 3.0
# A rise within this factor of the first rate means that the sweep began too high.
_EARLY = 30.0
# Losses of two chips differ by this share of their size: what differs less is equal, and the first of equals counts.
_ROUNDING = 1e-6
_GREY = "#8A8A8A"


def sweep_rates(first: float, last: float, steps: int) -> list[float]:
    """`steps` rates from `first` to `last`, each the same factor above the one before."""
    return [first * (last / first) ** (step / (steps - 1)) for step in range(steps)]


class Divergence:
    """Notices, update by update, that the loss runs away.

    It has when the moving mean of the losses exceeds `DIVERGED_AT` times its lowest value so far, and is above where
    it began: a loss close to zero is not running away because it is a little less close.
    """

    def __init__(self) -> None:
        self._first = self._best = math.inf
        self._sum = self._weight = 0.0

    def shows(self, loss: float) -> bool:
        """True if the loss has run away with this update; one that is not finite always has."""
        if not math.isfinite(loss):
            return True
        # Divided by the sum of its weights, the mean is right from the first update on.
        self._sum = _MEMORY * self._sum + (1 - _MEMORY) * loss
        self._weight = _MEMORY * self._weight + (1 - _MEMORY)
        mean = self._sum / self._weight
        if math.isinf(self._first):
            self._first = mean
        self._best = min(self._best, mean)
        return mean > self._best + max((DIVERGED_AT - 1) * abs(self._best), self._first - self._best)


@dataclass(frozen=True, slots=True)
class Reading:
    """The reading of a curve. Rates that it does not show are None."""

    smoothed: tuple[float, ...]
    """The losses without their noise, N of them."""
    noise: float
    """Spread (one standard deviation) of the losses around `smoothed`."""
    fall: float
    """Fall of the smoothed loss."""
    steepest: float | None
    """Rate at which it falls fastest per factor of the rate."""
    valley: float | None
    """Rate at which the steep descent ends."""
    diverged: float | None
    """Rate at which it has clearly risen again, or at which the sweep was stopped."""
    safe: float | None
    """A third of `diverged`."""
    suggestion: float | None
    """The lower of `valley` and `safe`, to two digits. None if the curve has no usable slope."""
    reason: str
    """The reason, as the end of a sentence."""


def read_curve(rates: Sequence[float], losses: Sequence[float], *, stopped: bool) -> Reading:
    """Read a curve of N rates and losses; `stopped` says that the loss ran away after the last."""
    if len(losses) < FEWEST_STEPS:
        at = f", at {rates[0]:.2g}" if rates else ""
        reason = f"the loss runs away as soon as the sweep begins{at}: begin lower with --from"
        return Reading(tuple(losses), 0.0, 0.0, None, None, None, None, None, reason)
    lr = np.asarray(rates, dtype=np.float64)
    loss = np.asarray(losses, dtype=np.float64)
    beginning = max(2, len(loss) // _BEGINNINGS_IN_SWEEP)
    start = float(loss[:beginning].mean())
    # What comes after the loss has doubled says only that it rises: it must not bend the curve before.
    smoothed, slope = smooth(np.log10(lr), np.minimum(loss, start + abs(start)))
    lowest = _first_lowest(smoothed)
    fall = start - float(smoothed[lowest])
    noise = _spread((loss - smoothed)[: max(lowest, beginning) + 1])
    ends = "it ran away" if stopped else "the sweep ended"

    def unusable(reason: str) -> Reading:
        return Reading(tuple(smoothed.tolist()), noise, fall, None, None, None, None, None, reason)

    if fall < max(_CLEAR_FALL * noise, _ROUNDING * abs(start)):
        above = np.flatnonzero(smoothed > start + _CLEAR_FALL * noise)
        if len(above) and lr[above[0]] < _EARLY * lr[0]:
            return unusable(f"the loss only rises, clearly from {lr[above[0]]:.2g} on: begin lower with --from")
        return unusable(
            f"the loss never falls clearly before {ends} at {lr[-1]:.2g} (by {fall:.2g}, its noise is {noise:.2g}): "
            "take more --steps or a larger batch_size, or choose a rate by hand"
        )
    steepest, valley = _descent(smoothed, slope, start, fall)
    if valley == len(lr) - 1 and not stopped:
        return unusable(f"the loss still falls at the end of the sweep, {lr[-1]:.2g}: go further with --to")
    if steepest < beginning:
        return unusable(f"the loss falls fastest as soon as the sweep begins, at {lr[0]:.2g}: begin lower with --from")
    risen = [step for step in range(valley, len(lr)) if smoothed[step] > smoothed[valley] + _RISEN * fall]
    diverged = float(lr[risen[0]]) if risen else float(lr[-1]) if stopped else None
    safe = None if diverged is None else diverged / _DISTANCE
    suggestion, reason = float(lr[valley]), "where the steep descent of the loss ends"
    if safe is not None and safe < suggestion:
        suggestion, reason = safe, f"a third of {diverged:.2g}, where the loss has clearly risen again"
    return Reading(
        smoothed=tuple(smoothed.tolist()),
        noise=noise,
        fall=fall,
        steepest=float(lr[steepest]),
        valley=float(lr[valley]),
        diverged=diverged,
        safe=safe,
        suggestion=float(f"{suggestion:.2g}"),
        reason=reason,
    )


def smooth(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The curve through `y` [N] without its noise, and its slope, both [N].

    At each point a straight line is fitted to the neighbours, weighted by a Gaussian of 1/25 of the sweep (local
    linear regression, Cleveland 1979): no lag behind the rate as in a moving mean, no bias at the ends.
    """
    width = (x[-1] - x[0]) / (len(x) - 1) * max(len(x) / _WIDTHS_IN_SWEEP, 1.0)
    distance = x[None, :] - x[:, None]  # [N, N]
    weight = np.exp(-0.5 * (distance / width) ** 2)
    w, wd, wdd = weight.sum(1), (weight * distance).sum(1), (weight * distance**2).sum(1)
    wy, wdy = weight @ y, (weight * distance) @ y
    determinant = w * wdd - wd**2
    return (wdd * wy - wd * wdy) / determinant, (w * wdy - wd * wy) / determinant


def draw_curve(name: str, rates: Sequence[float], losses: Sequence[float], reading: Reading) -> bytes:
    """Draw the curve as PNG: losses, smoothed loss, and the reading.

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


def _descent(smoothed: Floats, slope: Floats, start: float, fall: float) -> tuple[int, int]:
    """The steepest step of the first large descent, and the one at which that flattens.

    Networks with batch norm may fall a second time far above any useful rate; the first descent counts.
    """
    lowest = _first_lowest(smoothed)
    steepest = 0
    for step in range(lowest + 1):
        if slope[step] < slope[steepest] - _ROUNDING * abs(slope[steepest]):
            steepest = step
        if start - smoothed[step] >= _MOST * fall and slope[step] > _FLAT * slope[steepest]:
            return steepest, step
    return steepest, lowest


def _first_lowest(smoothed: Floats) -> int:
    low = float(smoothed.min())
    return int(np.flatnonzero(smoothed <= low + _ROUNDING * abs(low))[0])


def _spread(rest: Floats) -> float:
    """Standard deviation from the median distance, which single outliers do not change."""
    return float(1.4826 * np.median(np.abs(rest - np.median(rest))))


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
