"""The batch with the best rate is found, with what it changes, and a gain within the noise is none."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from opsin.errors import ConfigError
from opsin.run.recipe import read
from opsin.run.tuned import as_overrides, tuned_recipe
from opsin.tuning.batch import BatchTuning, Rule, _between, _variant, plan_tuning
from opsin.tuning.turns import Timing
from tests.digits_run import CONVNET, OVERRIDES, SMALL_VIT

IMAGES = 1438


def plan(*keys: str, rule: Rule = "keep", inexact: bool = False, model: Sequence[str] = SMALL_VIT) -> BatchTuning:
    return plan_tuning("quickstart", [*OVERRIDES, *model, *keys], rule=rule, inexact=inexact)[0]


def add(tuning: BatchTuning, size: float, *rates: float) -> Timing:
    variant = _variant(tuning, size, IMAGES)
    assert variant is not None
    tuning.timings.append(Timing(variant, rates=list(rates)))
    return tuning.timings[-1]


def test_the_update_is_kept_by_its_parts() -> None:
    tuning = plan("accumulate=2")
    sizes = {size: _variant(tuning, size, IMAGES) for size in (512, 256, 128, 85.3, 1, 0.5)}
    found = {size: None if variant is None else dict(variant.found) for size, variant in sizes.items()}
    parts = {size: keys and keys["accumulate"] for size, keys in found.items()}
    assert parts == {512: None, 256: 1, 128: 2, 85.3: 3, 1: 256, 0.5: None}
    assert all(variant is None or variant.recipe.batch_size == 256 for variant in sizes.values())


@pytest.mark.parametrize(("rule", "lr"), [("linear", 0.04), ("sqrt", 0.02)])
def test_the_learning_rate_follows_the_batch_by_the_rule(rule: Rule, lr: float) -> None:
    tuning = plan(rule=rule)
    variant = _variant(tuning, 1024, IMAGES)
    assert variant is not None
    assert dict(variant.found) == {"batch_size": 1024, "accumulate": 1, "optim.lr": lr}
    assert _variant(tuning, 2048, IMAGES) is None
    word = _variant(plan("optim.name=sgd", "optim.lr=linear", rule=rule), 512, IMAGES)
    assert word is not None
    assert dict(word.found) == {"batch_size": 512, "accumulate": 1}


def test_sizes_between_the_best_and_its_neighbours_are_tried_too() -> None:
    tuning = plan()
    tuning.current.rates = [90]
    best = add(tuning, 64, 100)
    add(tuning, 128, 95)
    assert [variant.found["accumulate"] for variant in _between(tuning, best, IMAGES)] == [5, 3]


def test_the_best_is_clearly_faster_or_nothing_is_gained() -> None:
    tuning = plan()
    tuning.current.rates = [100, 101, 99, 100, 100]
    near, better = add(tuning, 128, 101, 102, 100, 101, 101), add(tuning, 64, 120, 121, 119, 120, 120)
    assert tuning.verdict() == ["stopped before the end: nothing was decided"]
    tuning.is_done = True
    assert tuning.as_dict()["best"] == better.variant.found
    assert tuning.verdict() == ["best: accumulate=4, 1.20 times the recipe"]
    better.fault = "out of memory"
    assert tuning.as_dict()["best"] == {}
    assert near.gain_over(tuning.current) > 0
    assert "nothing gained" in tuning.lines()[-1]
    assert "out of memory" in tuning.lines()[-2]
    tuning.current.fault = "out of memory"
    assert tuning.as_dict()["best"] == near.variant.found


def test_batch_norm_decides_what_may_be_taken() -> None:
    for inexact in (False, True):
        tuning = plan(model=CONVNET, inexact=inexact)
        tuning.current.rates, tuning.is_done = [100, 100, 100], True
        better = add(tuning, 64, 150, 150, 150)
        assert tuning.best is (better if inexact else None)
        assert "batch norm" in tuning.verdict()[-1]
        assert ("--inexact" in tuning.verdict()[-1]) is not inexact


def test_a_rule_needs_one_batch_size() -> None:
    stages = "stages=[{epochs: 1, batch_size: 128}, {epochs: 1}]"
    with pytest.raises(ConfigError, match="batch sizes of their own"):
        plan(stages, "epochs=null", rule="sqrt")
    assert plan(stages, "epochs=null").batch_size == 256


def test_the_tuned_recipe_is_the_measured_one(tmp_path: Path) -> None:
    overrides, found = [*OVERRIDES, *SMALL_VIT, "accumulate=2"], {"accumulate": 4, "optim.lr": 0.02, "data.mean": None}
    text = tuned_recipe("quickstart", overrides, found, "a reason")
    assert text.startswith("# a reason\nextends: ")
    file = tmp_path / "tuned.yaml"
    file.write_text(text)
    assert read(str(file)) == read("quickstart", [*overrides, *as_overrides(found)])
