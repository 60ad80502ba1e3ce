"""Factors that make sense for a recipe are tried one after another, and only what clearly brings something is taken."""

import math

import pytest

from opsin.run.parts import build_parts
from opsin.run.recipe import read
from opsin.run.tuned import as_overrides
from opsin.storage.teller import Silence
from opsin.tuning.all import Comparison, FullTuning, plan_full_tuning
from opsin.tuning.factors import Factor, list_factors
from opsin.tuning.turns import Timing, Variant
from tests.digits_run import CONVNET, OVERRIDES, SMALL_VIT

RECIPE = read("quickstart", [*OVERRIDES, *SMALL_VIT])


def timing(*rates: float, start_s: float = 5.0, fault: str = "") -> Timing:
    return Timing(Variant({"threads": 1}, RECIPE, "threads=1"), rates=list(rates), start_s=start_s, fault=fault)


def compared(*others: Timing, changes: str = "", inexact: bool = False, images: int = 10**6) -> Comparison:
    before = timing(100, 101, 99, 100, 100)
    return Comparison(Factor("threads", ({"threads": 1},), changes), before, list(others), images, inexact)


FAST, NEAR, SLOW = (120, 121, 119, 120, 120), (101, 102, 100, 101, 101), (80, 81, 79, 80, 80)


@pytest.mark.parametrize(
    ("other", "objection"),
    [
        (timing(*FAST), ""),
        (timing(*NEAR), "within the spread"),
        (timing(*SLOW), "slower"),
        (timing(200, 110, 60, 115, 190), "within the spread"),
        (timing(120, 120), "not measured to the end"),
        (timing(*FAST, fault="out of memory"), "out of memory"),
        (timing(*FAST, start_s=5000.0), "faster, but the run would save 1667 s, and start later by more"),
    ],
    ids=["fast", "near", "slow", "noisy", "short", "fault", "late"],
)
def test_a_value_is_taken_if_the_run_is_clearly_faster(other: Timing, objection: str) -> None:
    comparison = compared(other)
    assert comparison.objection(other) == objection
    assert comparison.best is (None if objection else other)


def test_of_several_the_fastest_is_taken() -> None:
    faster = timing(*(2 * rate for rate in FAST))
    comparison = compared(timing(*FAST), faster, timing(*SLOW))
    assert comparison.best is faster
    assert [row[-1] for row in comparison.rows()] == ["", "less than another", "<- taken", "slower"]


@pytest.mark.parametrize("inexact", [False, True])
def test_other_mathematics_is_taken_only_if_allowed(inexact: bool) -> None:
    other = timing(*FAST)
    comparison = compared(other, changes="the number format", inexact=inexact)
    assert comparison.best is (other if inexact else None)
    assert ("changes the number format: --inexact" in comparison.objection(other)) is not inexact
    assert comparison.rows()[0][0] == "threads*"


def test_a_recipe_that_does_not_run_is_replaced_by_one_that_does() -> None:
    comparison = compared(timing(*SLOW), timing(*FAST))
    comparison.before.fault, comparison.before.rates = "out of memory", []
    assert comparison.best is comparison.others[1]


def keys_of(*overrides: str, recipe: str = "quickstart") -> dict[str, list[str]]:
    parts = build_parts(read(recipe, ["device=cpu", *overrides]), Silence())
    factors = list_factors(parts)
    for factor in factors:
        for found in factor.values:
            # Every value is a recipe, and another one.
            assert read(recipe, ["device=cpu", *overrides, *as_overrides(found)]) != parts.recipe
    return {
        f"{factor.name}{'*' if factor.changes else ''}": [" ".join(as_overrides(found)) for found in factor.values]
        for factor in factors
    }


def test_factors_are_those_that_can_make_a_difference() -> None:
    plain = keys_of(*OVERRIDES, *SMALL_VIT, "accumulate=2", "compile=true", "threads=1000")
    assert plain["precision*"] == ["precision=bf16"]
    assert plain["batch"] == ["accumulate=1", "accumulate=4", "accumulate=8"]
    assert plain["compile"] == ["compile=false"]
    assert plain["checkpointing"] == ["memory.checkpoint_blocks=true"]
    assert "data.resident=false data.workers=0" in plain["loader"]
    assert "threads=1" in plain["threads"]
    assert not {"channels_last", "view_chunk", "view_chunk*"} & plain.keys()
    assert list(plain)[-1] == "compile"
    views = keys_of("memory.view_chunk=2", "data.resident=false", "data.workers=1", recipe="dino-digits")
    assert views["view_chunk*"] == ["memory.view_chunk=null", "memory.view_chunk=1", "memory.view_chunk=4"]
    assert views["channels_last"] == ["channels_last=false"]
    assert views["loader"][:2] == ["data.resident=true", "data.workers=0"]
    assert "data.workers=1" not in views["loader"]
    assert keys_of(*OVERRIDES, *CONVNET)["batch*"] == ["accumulate=2", "accumulate=4"]


def plan() -> FullTuning:
    return plan_full_tuning("quickstart", [*OVERRIDES, *SMALL_VIT], inexact=False)[0]


def test_nothing_is_found_that_all_together_does_not_bring() -> None:
    tuning = plan()
    assert tuning.images == 2 * 5 * 256
    tuning.comparisons.append(compared(timing(*FAST)))
    tuning.found = {"threads": 1}
    assert "taken so far: threads=1" in tuning.lines()[-1]
    assert tuning.gained == {"threads": 1}
    for rates, last in ((FAST, "best: threads=1: 1.20 times the recipe"), (NEAR, "nothing gained: the recipe stays")):
        tuning.total, tuning.is_done = compared(timing(*rates)), True
        assert tuning.lines()[-1].startswith(last)
        assert bool(tuning.gained) is (rates is FAST)


def test_the_numbers_are_for_programs_too() -> None:
    tuning = plan()
    tuning.comparisons.append(compared(timing(*FAST), timing(fault="no compiler")))
    tuning.left_out.append("loader")
    facts = tuning.as_dict()
    assert facts["left_out"] == ["loader"]
    factors = facts["factors"]
    assert isinstance(factors, list)
    assert [other["objection"] for other in factors[0]["others"]] == ["", "no compiler"]
    assert math.isclose(factors[0]["others"][0]["brings"], 0.2, abs_tol=0.01)
    assert any("no time was left for: loader" in line for line in tuning.lines())
