"""What is read from the curves of sweeps, on curves whose answer is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from opsin.run.lr_curve import DIVERGED_AT, FEWEST_STEPS, Divergence, Reading, read_curve, smooth, sweep_rates

RATES = sweep_rates(1e-5, 1.0, 200)


def descent(rate: float, *, middle: float = 1e-3, width: float = 0.3) -> float:
    """From 2.3 to 0.7, steepest at `middle`, 98 % of it within +-2 `width` decades."""
    return 0.7 + 1.6 / (1 + math.exp(2 * (math.log10(rate) - math.log10(middle)) / width))


def curve(loss: Callable[[float], float], *, noise: float = 0.0, seed: int = 0) -> list[float]:
    draws = np.random.default_rng(seed).normal(0, 1, len(RATES))
    return [loss(rate) + noise * float(draw) for rate, draw in zip(RATES, draws, strict=True)]


def reading(loss: Callable[[float], float], *, noise: float = 0.02, stopped: bool = False) -> Reading:
    return read_curve(RATES, curve(loss, noise=noise), stopped=stopped)


def with_rise(rate: float, *, at: float) -> float:
    """The descent, and a parabola of the logarithm from `at` on: 0.4 higher after a third of a decade."""
    return descent(rate) + 3.6 * max(0.0, math.log10(rate / at)) ** 2


def test_rates_rise_by_one_factor() -> None:
    rates = sweep_rates(1e-6, 10.0, 141)
    assert rates[0] == 1e-6
    assert rates[-1] == pytest.approx(10.0)
    # 7 decades in 140 steps: 20 steps make a factor of ten.
    assert [rates[20 * decade] for decade in range(8)] == pytest.approx([1e-6 * 10**decade for decade in range(8)])


def test_smoothing_gives_a_line_and_its_slope_exactly() -> None:
    # A local line through points of a line is that line, at the ends too.
    x = np.linspace(-5, 0, 60)
    smoothed, slope = smooth(x, 3 - 2 * x)
    np.testing.assert_allclose(smoothed, 3 - 2 * x, atol=1e-9)
    np.testing.assert_allclose(slope, -2, atol=1e-9)


def test_smoothing_equals_weighted_least_squares_at_each_point() -> None:
    x = np.linspace(0, 4, 50)
    y = np.random.default_rng(1).normal(0, 1, 50)
    smoothed, slope = smooth(x, y)
    width = 4 / 49 * 50 / 25
    for i in range(50):
        weight = np.exp(-0.5 * ((x - x[i]) / width) ** 2)
        b, a = np.polyfit(x - x[i], y, 1, w=np.sqrt(weight))  # polyfit squares its weights
        assert smoothed[i] == pytest.approx(a, abs=1e-9)
        assert slope[i] == pytest.approx(b, abs=1e-9)


def test_the_suggestion_is_where_the_steep_descent_ends() -> None:
    found = reading(lambda rate: with_rise(rate, at=0.05))
    # The middle of the descent, within the width of the smoothing (a fifth of a decade).
    assert found.steepest == pytest.approx(1e-3, rel=0.6)
    # The slope of the descent falls to a quarter of its best about 0.4 decades behind the middle: 2.5e-3.
    assert found.suggestion is not None
    assert 1.5e-3 < found.suggestion < 6e-3
    assert found.suggestion == pytest.approx(found.valley, rel=0.06)
    assert "steep descent" in found.reason
    # 0.4 (a quarter of the fall) above the valley is reached a third of a decade after 0.05: 0.108.
    assert found.diverged == pytest.approx(0.108, rel=0.25)
    assert found.diverged is not None
    assert found.safe == pytest.approx(found.diverged / 3)


def test_the_suggestion_stays_below_a_rise_that_follows_at_once() -> None:
    found = reading(lambda rate: with_rise(rate, at=2e-3))
    assert found.valley is not None
    assert found.suggestion is not None
    assert found.diverged is not None
    assert found.suggestion < found.valley
    assert found.suggestion == pytest.approx(found.diverged / 3, rel=0.06)
    assert "risen again" in found.reason


def test_a_second_fall_at_high_rates_does_not_count() -> None:
    def twice(rate: float) -> float:
        # A hump at 0.1, and behind it a fall 0.1 deeper than the first.
        return descent(rate) + 0.5 * math.exp(-((math.log10(rate / 0.1) / 0.2) ** 2)) - 0.1 * (rate > 0.25)

    found = reading(twice)
    assert found.suggestion is not None
    assert found.suggestion < 0.01


def test_the_runaway_end_does_not_bend_the_curve_before_it() -> None:
    calm = reading(lambda rate: with_rise(rate, at=0.05))
    wild = reading(lambda rate: with_rise(rate, at=0.05) + (1e6 if rate > 0.9 else 0.0), stopped=True)
    assert wild.suggestion == calm.suggestion


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_suggestion_little(seed: int) -> None:
    # Noise of a sixteenth of the fall; a factor of 1.6 is a fifth of a decade, the width of the smoothing.
    losses = curve(lambda rate: with_rise(rate, at=0.05), noise=0.1, seed=seed)
    clean = read_curve(RATES, curve(lambda rate: with_rise(rate, at=0.05)), stopped=False).suggestion
    noisy = read_curve(RATES, losses, stopped=False)
    assert noisy.noise == pytest.approx(0.1, rel=0.3)
    assert clean is not None
    assert noisy.suggestion is not None
    assert clean / 1.6 < noisy.suggestion < clean * 1.6


def test_a_curve_without_a_usable_slope_says_why() -> None:
    cases = {
        "never falls clearly": read_curve(RATES, curve(lambda rate: 2.3, noise=0.05), stopped=False),
        "still falls at the end of the sweep, 1:": reading(lambda rate: descent(rate, middle=1.0)),
        "falls fastest as soon as the sweep begins": reading(lambda rate: descent(rate, middle=1.3e-5, width=0.05)),
        "only rises, clearly from": reading(lambda rate: 2.3 + (rate / 1e-5) * 0.01),
        "runs away as soon as the sweep begins, at 1e-05": read_curve(RATES[:5], [2.3, 2.4, 3, 5, 9], stopped=True),
    }
    for words, found in cases.items():
        assert found.suggestion is None, words
        assert words in found.reason


def test_a_loss_that_stays_where_it_is_never_falls() -> None:
    """Smoothing leaves roundings of 1e-16, which must not look like a descent."""
    for constant in (2.302585, 0.1, 7.0):
        assert "never falls clearly" in reading(lambda _, loss=constant: loss, noise=0.0).reason  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(5))
def test_roundings_of_another_chip_change_no_reading(seed: int) -> None:
    """A straight descent to a floor: every step is the steepest, and every step of the floor the lowest."""
    rates = sweep_rates(1e-6, 1.0, 200)
    losses = [max(2.0 - 0.5 * (math.log10(rate) + 6), 0.5) for rate in rates]
    other = np.array(losses) * (1 + 1e-8 * np.random.default_rng(seed).standard_normal(200))
    one, two = (read_curve(rates, values, stopped=False) for values in (losses, other.tolist()))
    assert (one.steepest, one.valley, one.suggestion, one.reason) == (
        two.steepest,
        two.valley,
        two.suggestion,
        two.reason,
    )


def test_a_sweep_that_rises_only_has_no_suggestion() -> None:
    found = read_curve(RATES[:60], [2.3 + 0.1 * step for step in range(60)], stopped=True)
    assert found.suggestion is None


def test_a_sweep_without_a_single_loss_is_read_too() -> None:
    found = read_curve([], [], stopped=True)
    assert found.suggestion is None
    assert found.smoothed == ()


def test_the_fewest_steps_are_enough_for_a_clear_curve() -> None:
    rates = sweep_rates(1e-5, 1.0, FEWEST_STEPS)
    found = read_curve(rates, [descent(rate, middle=1e-2) for rate in rates], stopped=False)
    assert found.suggestion is not None
    assert 1e-2 < found.suggestion < 1e-1


# --- divergence ---------------------------------------------------------------------------------


def seen_at(losses: list[float]) -> int | None:
    divergence = Divergence()
    return next((step for step, loss in enumerate(losses) if divergence.shows(loss)), None)


def test_divergence_is_a_mean_of_several_times_the_best() -> None:
    losses = [1.0] * 30 + [3.9] * 200
    assert seen_at(losses) is None
    at = seen_at([1.0] * 30 + [5.0] * 200)
    # After k of the fives, their share of the mean is (1 - 0.9^k) / (1 - 0.9^(30 + k)): above 3/4 with k = 13.
    assert at == 30 + 13 - 1
    assert DIVERGED_AT == 4


def test_one_outlier_is_no_divergence() -> None:
    assert seen_at([2.0] * 30 + [40.0] + [2.0] * 30) is None


def test_a_loss_near_zero_may_move() -> None:
    # Ten times the best, and still far below where it began.
    assert seen_at([2.3] * 20 + [0.01] * 100 + [0.1] * 100) is None


def test_a_negative_loss_is_judged_by_its_distance() -> None:
    assert seen_at([0.5] * 10 + [-2.0] * 60 + [-1.0] * 60) is None
    assert seen_at([0.5] * 10 + [-2.0] * 60 + [9.0] * 60) is not None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_divergence_at_once(loss: float) -> None:
    assert seen_at([1.0, loss]) == 1
