"""Sweeps of the learning rate on digits: what they train, what they write, and that a run never sees them."""

import csv
import hashlib
import io
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsin.clock.schedule import Constant
from opsin.commands.main import main
from opsin.commands.verify import digest
from opsin.errors import ConfigError, DataError, OpsinError, RunError, TrainingError
from opsin.processes.trail import VARIABLE, LastActivity, follow
from opsin.reporting.console import Console, open_console
from opsin.reporting.journal import Journal
from opsin.reporting.teller import RunTeller
from opsin.run.assemble import assemble
from opsin.run.lr_curve import sweep_rates
from opsin.run.parts import build_parts
from opsin.run.rates import find_rates
from opsin.run.recipe import Recipe, read
from opsin.run.session import train_recipe
from opsin.run.sweep import SweepRange, choose_range, rising_losses, run_sweep, scaled_rates, sweep_key
from opsin.settings.text import to_yaml
from opsin.storage.directory import RunDirectory
from opsin.storage.teller import Silence
from opsin.training.loop import Run
from opsin.training.state import LossScale, TrainState
from opsin.tuning.lr import tune_lr
from tests.cli.commands import pictures
from tests.conftest import RunOpsin
from tests.digits_run import CONVNET, OVERRIDES, digits_recipe, train_digits
from tests.story import Story
from tests.unit.data.pictures import png

pytestmark = pytest.mark.usefixtures("torch_switches")

KEYS = (*(key for key in OVERRIDES if not key.startswith("optim.lr")), *CONVNET, "batch_size=64", "log.plots=false")
"""A convolutional network that learns digits in a hundred updates."""
SGD = ("optim.name=sgd", "optim.weight_decay=0")
STEPS = 100


def quiet() -> Console:
    return open_console(quiet=True, stream=io.StringIO())


def small(*overrides: str) -> Recipe:
    return read("quickstart", [*KEYS, *overrides])


def assembled(recipe: Recipe, place: Path) -> Run:
    teller = RunTeller(Journal(place, teller=quiet()), quiet())
    return assemble(build_parts(recipe, teller), RunDirectory(place), teller)


# --- what is trained ------------------------------------------------------------------------------


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


# --- what is written ------------------------------------------------------------------------------


def test_a_sweep_writes_its_curve_a_picture_and_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "lr"
    keys = [*KEYS, 'data.cache=a b"c', "evaluators={val: null}", "optim.betas=[0.9, 0.95]"]
    found = tune_lr("quickstart", keys, out=out, steps=STEPS, quiet=True)
    assert found.suggestion is not None
    assert sorted(path.name for path in out.iterdir()) == ["lr.csv", "lr.json", "lr.png", "tuned.yaml"]
    rows = list(csv.DictReader((out / "lr.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(len(rows)))
    assert [float(row["lr"]) for row in rows] == pytest.approx(sweep_rates(1e-5, 1.0, STEPS)[: len(rows)], rel=1e-5)
    assert (out / "lr.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "lr.json").read_text())
    assert (result["rates"], result["reason"]) == ({"lr": found.suggestion}, found.reason)
    assert read(str(out / "tuned.yaml")) == read("quickstart", [*keys, f"optim.lr={found.suggestion}"])


def test_a_tuned_recipe_extends_a_file_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(to_yaml(small(), comments=False))
    found = tune_lr("mine.yaml", steps=STEPS, quiet=True)
    monkeypatch.chdir("/")
    tuned = read(str(tmp_path / "runs" / "mine-lr" / "tuned.yaml"))
    assert tuned == read(str(tmp_path / "mine.yaml"), [f"optim.lr={found.suggestion}"])


def test_no_recipe_is_written_without_a_usable_slope(tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text("of an earlier sweep")
    with pytest.raises(TrainingError, match=r"^quickstart: no learning rate found: the loss never falls clearly"):
        tune_lr("quickstart", KEYS, out=tmp_path, first=1e-9, last=1e-8, steps=30, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr.csv", "lr.json", "lr.png"]
    assert json.loads((tmp_path / "lr.json").read_text())["rates"] == {}


def test_a_sweep_that_diverges_at_once_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"runs away as soon as the sweep begins, at 1e\+06: begin lower"):
        tune_lr("quickstart", [*KEYS, *SGD], out=tmp_path, first=1e6, last=1e9, steps=30, quiet=True)
    assert not (tmp_path / "tuned.yaml").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("of a run")
    with pytest.raises(RunError, match=r"holds other files \(recipe.yaml\)"):
        tune_lr("quickstart", KEYS, out=tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


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


# --- no trace -------------------------------------------------------------------------------------


def first_steps(out: Path) -> str:
    """The hash of the weights after twenty updates of a network with dropout."""
    train_digits(out, "limits.steps=20", "log.plots=false", model=("model.width=16", "model.depth=2", "model.heads=2"))
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def test_a_sweep_leaves_no_trace_in_a_run(tmp_path: Path, run_opsin: RunOpsin) -> None:
    model = ["model.width=16", "model.depth=2", "model.heads=2"]
    before = first_steps(tmp_path / "before")
    with suppress(TrainingError):  # whether the curve is usable does not matter here
        tune_lr("quickstart", [*OVERRIDES, *model], out=tmp_path / "here", steps=30, quiet=True)
    assert (tmp_path / "here" / "lr.json").exists()
    assert first_steps(tmp_path / "after one in this process") == before
    run_opsin("tune", "lr", "quickstart", *OVERRIDES, *model, "--steps=30", "--quiet", "--out", "there")
    assert (tmp_path / "there" / "lr.json").exists()
    assert first_steps(tmp_path / "after one in another process") == before


# --- optim.lr=auto --------------------------------------------------------------------------------


def test_a_search_runs_once_for_a_recipe(tmp_path: Path) -> None:
    folder, story = tmp_path / "run-lr", Story()
    found = find_rates(small("optim.lr=auto"), folder, name="mine", teller=story)
    assert 1e-4 < found["lr"] < 0.1
    assert read(str(folder / "tuned.yaml")) == small(f"optim.lr={found['lr']}")
    written = (folder / "lr.json").stat().st_mtime_ns
    again = small("optim.lr=auto", "log.every=7", "limits.steps=3")
    assert find_rates(again, folder, name="mine", teller=story) == found
    assert (folder / "lr.json").stat().st_mtime_ns == written
    assert story.notices == [
        f"optim.lr=auto: sweeping the learning rate first ({folder})",
        f"optim.lr=auto: lr={found['lr']:g}",
        f"optim.lr=auto: lr={found['lr']:g}, found before ({folder})",
    ]


@pytest.mark.parametrize("optimizer", [SGD, ("optim.name=muon", "optim.other_lr=0.05")], ids=["sgd", "muon"])
def test_a_run_after_its_own_sweep_has_the_bits_of_one_with_the_rate_by_hand(
    optimizer: tuple[str, ...], tmp_path: Path
) -> None:
    keys = (*optimizer, "limits.steps=10")
    train_recipe(small(*keys, "optim.lr=auto"), tmp_path / "auto", name="auto", quiet=True)
    found = read(str(tmp_path / "auto" / "recipe.yaml")).optim
    rates = [f"optim.{name}={value}" for name, value in found if name in ("lr", "other_lr")]
    train_recipe(small(*keys, *rates), tmp_path / "by hand", name="by hand", quiet=True)
    assert digest(RunDirectory(tmp_path / "auto")) == digest(RunDirectory(tmp_path / "by hand"))


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a supervisor."""
    folder = tmp_path / "trail"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.mark.parametrize(
    ("keys", "kind", "fault", "is_final"),
    [
        (("data.path=nowhere",), DataError, "nowhere: ", False),
        (("batch_size=100000",), ConfigError, "batch_size=100000: ", False),
        (("data.path=same", "batch_size=8"), TrainingError, "mine: no learning rate found: the loss never fa", True),
    ],
    ids=["no data", "no batch", "no slope"],
)
def test_a_search_that_finds_nothing_says_why_and_whether_another_may(
    keys: tuple[str, ...],
    kind: type[OpsinError],
    fault: str,
    is_final: bool,
    tmp_path: Path,
    trail: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in pictures(tmp_path / "same").rglob("*.png"):
        path.write_bytes(png(0))  # of both classes: nothing can be learned
    recipe = small(*SGD, *keys, "optim.lr=auto")
    with pytest.raises(kind, match=f"^optim.lr=auto: {fault}"):
        find_rates(recipe, tmp_path / "lr", name="mine", teller=Silence())
    assert follow(trail) == LastActivity(), "the sweep is not part of the run"
    (tmp_path / "mine.yaml").write_text(to_yaml(recipe, comments=False))
    assert main(["train", "mine.yaml", "--out", "run", "--quiet"]) == kind.exit_status
    assert (follow(trail).verdict is not None) == is_final
    assert not (tmp_path / "run").exists()


def test_a_damaged_result_is_no_result(tmp_path: Path) -> None:
    recipe = small("optim.lr=auto", f"data.path={tmp_path}/nowhere")
    (tmp_path / "lr").mkdir()
    for text in ("", "[]", "{}", '{"key": 1, "rates": {"lr": 1}}'):
        (tmp_path / "lr" / "lr.json").write_text(text)
        with pytest.raises(DataError, match="nowhere"):
            find_rates(recipe, tmp_path / "lr", name="mine", teller=Silence())


def test_a_result_holds_for_recipes_that_a_sweep_cannot_tell_apart() -> None:
    key = sweep_key(digits_recipe())
    for same in ("optim.lr=0.5", "log.every=3", "limits.hours=1", "checkpoints.every=1 step"):
        assert sweep_key(digits_recipe(same)) == key
    for other in ("seed=1", "batch_size=32", "precision=bf16", "optim.name=sgd", "method.label_smoothing=0"):
        assert sweep_key(digits_recipe(other)) != key
