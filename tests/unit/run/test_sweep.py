"""Sweeps of the learning rate on digits: what they train, over which range, and with what result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsin.clock.schedule import Constant
from opsin.errors import ConfigError
from opsin.reporting.journal import Journal
from opsin.reporting.teller import RunTeller
from opsin.run.assemble import assemble
from opsin.run.lr_curve import sweep_rates
from opsin.run.parts import build_parts
from opsin.run.recipe import Recipe
from opsin.run.sweep import SweepRange, choose_range, rising_losses, run_sweep, scaled_rates, sweep_key
from opsin.storage.directory import RunDirectory
from opsin.training.loop import Run
from opsin.training.state import LossScale, TrainState
from tests.digits_run import digits_recipe
from tests.unit.run.sweeps import SGD, quiet, small

pytestmark = pytest.mark.usefixtures("torch_switches")


def assembled(recipe: Recipe, place: Path) -> Run:
    teller = RunTeller(Journal(place, teller=quiet()), quiet())
    return assemble(build_parts(recipe, teller), RunDirectory(place), teller)


def plain_losses(recipe: Recipe, rates: list[float], place: Path) -> list[float]:
    """The same as a loop over parameters: momentum 0.9 without Nesterov, the head three times as fast."""
    run = assembled(recipe, place)
    state = run.start.fresh()
    params = {name: param for name, param in state.method.named_parameters() if param.requires_grad}
    velocity: dict[str, Tensor] = {name: torch.zeros_like(param) for name, param in params.items()}
    losses = []
    for batch, rate in zip(run.data.batches(0, len(rates)), rates, strict=True):
        loss = state.method(batch, run.plan.clock(0)).total
        losses.append(float(loss.detach()))
        state.method.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, param in params.items():
                assert param.grad is not None
                velocity[name] = 0.9 * velocity[name] + param.grad
                param.sub_(velocity[name] * rate * (3 if name.startswith("head.") else 1))
    return losses


def test_a_sweep_is_training_with_one_rate_after_the_other(tmp_path: Path) -> None:
    keys = (*SGD, "optim.nesterov=false", "optim.lr=0.7", "method.head_lr_factor=3")
    swept = run_sweep(small(*keys), SweepRange(1e-4, 1e-1, 20), quiet())
    assert swept.rates == pytest.approx(sweep_rates(1e-4, 1e-1, 20))
    assert not swept.stopped
    plain = plain_losses(small(*keys), list(swept.rates), tmp_path)
    # Both in fp32, sums in another order: 1e-7 per sum, magnified by twenty updates.
    assert swept.losses == pytest.approx(plain, rel=1e-4)
    assert plain[-1] < plain[0] - 0.2


@pytest.mark.parametrize("lr", ["auto", "linear", "0.003"])
def test_the_rate_and_the_schedule_of_the_recipe_do_not_matter(lr: str) -> None:
    asked = SweepRange(1e-4, 1e-1, 20)
    schedule = "optim.schedule={name: onecycle, start: 0.5}"
    one = run_sweep(small(*SGD, "optim.lr=0.5"), asked, quiet())
    # 0.003 is no power of two: rates differ by a rounding.
    assert run_sweep(small(*SGD, f"optim.lr={lr}", schedule), asked, quiet()).losses == pytest.approx(
        one.losses, rel=1e-4
    )


def test_the_stage_in_which_all_layers_train_is_swept() -> None:
    asked = SweepRange(1e-3, 1e-1, 20)
    stages = 'stages=[{epochs: 1, train: ["head.*"]}, {epochs: 1, batch_size: 32, lr_scale: 0.5}]'
    staged = run_sweep(small(*SGD, stages), asked, quiet())
    # The rate of the recipe is what is swept: this stage halves it.
    alone = run_sweep(small(*SGD, "batch_size=32"), SweepRange(5e-4, 5e-2, 20), quiet())
    assert staged.losses == pytest.approx(alone.losses, rel=1e-4)


def test_a_sweep_ends_where_the_loss_runs_away() -> None:
    swept = run_sweep(small(*SGD), SweepRange(1e-2, 1e6, 60), quiet())
    assert swept.stopped
    assert len(swept.rates) == len(swept.losses) < 60


class Scaled:
    """The start of a run whose loss is scaled."""

    def __init__(self, run: Run, scale: float) -> None:
        self._start = run.start
        self._scale = scale
        self.over, self.commit = run.start.over, run.start.commit

    def fresh(self) -> TrainState:
        state = self._start.fresh()
        state.loss_scale = LossScale.start(torch.device("cpu"), self._scale)
        return state


def scaled(run: Run, scale: float) -> Run:
    return replace(run, start=Scaled(run, scale))


def test_an_update_that_the_loss_scale_cancels_is_no_divergence(tmp_path: Path) -> None:
    recipe = small(*SGD, "optim.lr=0.01")
    steady = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"schedule": Constant()})})
    # 2^126 times a gradient of some 0.01 exceeds fp32; ten halvings later all is well.
    losses, stopped = rising_losses(scaled(assembled(steady, tmp_path), 2.0**126), [1.0] * 60, quiet())
    assert not stopped
    assert len(losses) == 60
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(
    ("first", "last", "steps", "fault"),
    [
        (None, None, 19, "--steps 19: too few"),
        (1e-2, 1e-3, 50, "--from 0.01 --to 0.001: must be two rates above 0, the smaller one first"),
        (1e-2, 1e-2, 50, "the smaller one first"),
        (0.0, 1.0, 50, "above 0"),
        (1e-3, float("inf"), 50, "above 0"),
    ],
)
def test_a_range_that_is_none_is_refused(first: float | None, last: float | None, steps: int, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        choose_range(small(), first, last, steps)


def test_each_optimizer_has_a_range_of_its_own() -> None:
    assert choose_range(small(), None, None, 50) == SweepRange(1e-5, 1.0, 50)
    assert choose_range(small(*SGD), None, None, 50) == SweepRange(1e-4, 10.0, 50)
    assert choose_range(small(*SGD), 1e-3, None, 50) == SweepRange(1e-3, 10.0, 50)


def test_other_rates_of_an_optimizer_go_along() -> None:
    muon = small("optim.name=muon", "optim.lr=0.02", "optim.other_lr=0.05")
    assert scaled_rates(muon, 0.04) == {"lr": 0.04, "other_lr": 0.1}
    # `auto` stands in the place of the optimizer's default, 0.02.
    assert scaled_rates(small("optim.name=muon", "optim.lr=auto", "optim.other_lr=0.05"), 0.04)["other_lr"] == 0.1
    assert scaled_rates(small(), 0.04) == {"lr": 0.04}


def test_a_result_holds_for_recipes_that_a_sweep_cannot_tell_apart() -> None:
    key = sweep_key(digits_recipe())
    for same in ("optim.lr=0.5", "log.every=3", "limits.hours=1", "checkpoints.every=1 step"):
        assert sweep_key(digits_recipe(same)) == key
    for other in ("seed=1", "batch_size=32", "precision=bf16", "optim.name=sgd", "method.label_smoothing=0"):
        assert sweep_key(digits_recipe(other)) != key
