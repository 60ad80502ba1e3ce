"""Gradient norms that leave their usual range."""

import math
from collections.abc import Iterable

from opsin.monitors.gradients import GradientsConfig
from opsin.training.monitor import Finding
from tests.unit.monitors.synthetic import TIMELINE, judged


def found(norms: Iterable[float]) -> dict[int, Finding]:
    return judged(GradientsConfig().build(TIMELINE), [{"train/grad_norm": norm} for norm in norms])


def test_an_explosion_is_told_with_its_size() -> None:
    explosion = found([2.0] * 10 + [40.0, 44.0, 2.0])
    assert {step: finding.kind for step, finding in explosion.items()} == {
        550: "gradient_explosion",
        600: "gradient_explosion",
    }
    assert explosion[600].text == (
        "gradient explosion: norm 44, 22 times its median, since step 550; lower optim.lr, or set optim.clip_norm"
    )


def test_large_networks_may_have_large_gradients() -> None:
    assert found([60.0, 55.0, 70.0, 65.0] * 10) == {}


def test_small_gradients_may_vary() -> None:
    assert found([0.1] * 10 + [5.0]) == {}


def test_the_first_rows_are_no_explosion() -> None:
    assert found([300.0, 80.0, 20.0, 5.0, 3.0, 2.0, 2.0]) == {}


def test_rows_without_a_norm_are_passed_over() -> None:
    assert list(found([2.0] * 10 + [math.nan, 40.0])) == [600]


def test_vanished_gradients_are_no_divisor() -> None:
    assert list(found([0.0] * 10 + [40.0])) == [550]
