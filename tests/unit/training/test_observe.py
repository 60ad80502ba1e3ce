"""What is read from a run, when, and what it costs."""

import io
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from opsin.clock.timeline import Stage, Timeline
from opsin.errors import TrainingError
from opsin.methods.base import Method
from opsin.nn.ema import ModelEma
from opsin.reporting.console import Console
from opsin.reporting.journal import Journal, read_events
from opsin.reporting.teller import RunTeller
from opsin.training.agenda import Agenda
from opsin.training.evaluations import Evaluations
from opsin.training.evaluator import Evaluator, FeatureCache
from opsin.training.monitor import Monitor
from opsin.training.observe import Observations, Saves
from opsin.training.state import ScheduledValues, StepReport, TrainState
from opsin.training.stopwatch import Stopwatch
from tests.story import Calm
from tests.unit.training.tiny_run import fresh

TIMELINE = Timeline([Stage(epochs=10, batch_size=4, steps_per_epoch=5)])
READS = {Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.numpy, Tensor.__float__, Tensor.__int__, Tensor.__bool__}


class Scenario:
    """A run of which only the reports are real: `step` makes one update of a second."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        self.folder = folder
        self.journal = Journal(folder, teller=Calm())
        self.screen = io.StringIO()
        self.teller = RunTeller(self.journal, Console(self.screen))
        self.state = fresh()

    def observations(
        self,
        *,
        every: int = 3,
        limit: int = 20,
        last_step: int = 50,
        monitors: Mapping[str, tuple[str, Monitor]] = MappingProxyType({}),
        saves: Saves | None = None,
    ) -> Observations:
        cadences = {name: cadence for name, (cadence, _) in monitors.items()}
        agenda = Agenda(TIMELINE, last_step, rows=every, monitors=cadences)
        asked = {name: monitor for name, (_, monitor) in monitors.items()}
        return Observations(self.teller, agenda, limit=limit, monitors=asked, saves=saves)

    def step(self, observations: Observations, loss: float = 1.0, *, norm: float = 1.0) -> None:
        self.now += 1.0
        clock = TIMELINE.clock(self.state.step)
        self.state.step += 1
        values = {"train/loss": torch.tensor(loss), "train/grad_norm": torch.tensor(norm)}
        applied = torch.tensor(float(math.isfinite(loss) and math.isfinite(norm)))
        ids = torch.tensor([7, 8, 9, 10])
        times = Stopwatch(torch.device("cpu"))
        report = StepReport(self.state.step, clock, ScheduledValues(0.1, 0.9, 0.0), values, applied, ids, 4, times)
        observations.take(self.state, report)

    def steps(self, observations: Observations, losses: Iterable[float]) -> None:
        with observations.watch(self.state):
            for loss in losses:
                self.step(observations, loss)

    def rows(self) -> dict[int, Mapping[str, float]]:
        return {row.step: row.values for row in self.journal.rows()}

    def events(self, kind: str) -> list[Mapping[str, Any]]:
        return [event.facts for event in read_events(self.folder / "events.jsonl") if event.kind == kind]


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scenario:
    return Scenario(tmp_path, monkeypatch)


class SavesAt:
    """Checkpoints of one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def is_due(self, state: TrainState) -> bool:
        return state.step == self.step


class StepOf(Monitor):
    """A monitor that gives the step it is asked at."""

    def measure(self, state: TrainState, report: StepReport) -> Mapping[str, float]:
        assert state.step == report.step
        return {"watched/step": float(report.step)}


class Reads(TorchFunctionMode):
    """Counts the calls that wait for the device."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


def test_a_row_holds_the_mean_of_its_window(scenario: Scenario) -> None:
    scenario.steps(scenario.observations(every=3), [1.0, 2.0, 6.0, 4.0])
    rows = scenario.rows()
    assert list(rows) == [3, 4], "the last window is read when the run ends"
    assert rows[3] == {
        "train/loss": 3.0,
        "train/grad_norm": 1.0,
        "train/lr": 0.1,
        "train/momentum": 0.9,
        "train/weight_decay": 0.0,
        "train/images_per_s": 4.0,
        "time/data_ms": 0.0,
    }
    assert rows[4]["train/loss"] == 4.0


def test_windows_end_with_the_epoch_and_where_else_it_is_wanted(scenario: Scenario) -> None:
    scenario.steps(scenario.observations(every=100, saves=SavesAt(7)), [1.0] * 11)
    assert list(scenario.rows()) == [5, 7, 10, 11]


def test_a_window_costs_one_read_from_the_device_and_a_step_none(scenario: Scenario) -> None:
    observations = scenario.observations(every=4)
    with observations.watch(scenario.state), Reads() as reads:
        for _ in range(3):
            scenario.step(observations)
        assert reads.count == 0
        scenario.step(observations)
        assert reads.count == 1


@pytest.mark.parametrize("every", [3, 100])
def test_monitors_measure_when_they_are_due_whatever_the_window(scenario: Scenario, every: int) -> None:
    scenario.steps(scenario.observations(every=every, monitors={"mine": ("4 steps", StepOf())}), [1.0] * 9)
    measured = [values["watched/step"] for values in scenario.rows().values() if "watched/step" in values]
    assert measured == [4, 8]


class Nothing(Monitor):
    """A monitor that has nothing to look at."""


def test_a_monitor_that_measures_nothing_makes_no_row(scenario: Scenario) -> None:
    scenario.steps(scenario.observations(every=5, monitors={"mine": ("2 steps", Nothing())}), [1.0] * 10)
    assert list(scenario.rows()) == [5, 10]


def test_cancelled_updates_are_told_and_left_out_of_the_means(scenario: Scenario) -> None:
    scenario.steps(scenario.observations(every=4), [1.0, math.nan, 3.0, math.inf])
    assert scenario.rows()[4]["train/loss"] == 2.0
    assert scenario.events("step_cancelled") == [
        {"loss": "nan", "grad_norm": 1.0, "ids": [7, 8, 9, 10]},
        {"loss": "inf", "grad_norm": 1.0, "ids": [7, 8, 9, 10]},
    ]


def test_the_first_of_cancelled_updates_is_a_warning(scenario: Scenario) -> None:
    scenario.steps(scenario.observations(every=2), [1.0, math.nan, math.inf, 1.0, math.nan])
    lines = [line for line in scenario.screen.getvalue().splitlines() if line.startswith("warning: ")]
    assert lines == [
        f"warning: step {step}: loss nan: the update was cancelled; events.jsonl lists them all" for step in (2, 5)
    ]


@pytest.mark.parametrize(("scaled", "warnings"), [(True, 0), (False, 1)])
def test_a_gradient_that_overflows_is_normal_with_a_loss_scale(scenario: Scenario, scaled: bool, warnings: int) -> None:
    scenario.state = fresh(scaled=scaled)
    observations = scenario.observations(every=1)
    with observations.watch(scenario.state):
        scenario.step(observations, norm=math.inf)
    assert scenario.screen.getvalue().count("warning: ") == warnings


def test_a_window_of_cancelled_updates_has_no_loss(scenario: Scenario) -> None:
    scenario.steps(scenario.observations(every=2), [math.nan, math.nan])
    assert set(scenario.rows()[2]) == {
        "train/lr",
        "train/momentum",
        "train/weight_decay",
        "train/cancelled",
        "train/images_per_s",
        "time/data_ms",
    }


def test_too_many_cancelled_updates_in_a_row_end_the_run(scenario: Scenario) -> None:
    observations = scenario.observations(every=2, limit=3)
    # The row of three reaches over two windows.
    with pytest.raises(TrainingError) as caught:
        scenario.steps(observations, [1.0, math.nan, math.nan, math.nan])
    assert str(caught.value) == (
        "step 4: loss nan, and so were the 2 updates before it; limits.cancelled_in_a_row allows 3. "
        "The weights are those of step 1. Lower optim.lr, set optim.clip_norm, or try precision=fp32"
    )
    assert len(scenario.events("step_cancelled")) == 3


def test_a_gradient_is_named_where_the_loss_was_finite(scenario: Scenario) -> None:
    observations = scenario.observations(every=1, limit=1)
    with observations.watch(scenario.state), pytest.raises(TrainingError, match="step 1: gradient norm inf"):
        scenario.step(observations, norm=math.inf)


def test_a_good_update_starts_the_count_again(scenario: Scenario) -> None:
    scenario.steps(scenario.observations(every=1, limit=3), [math.nan, math.nan, 1.0] * 4)
    assert len(scenario.events("step_cancelled")) == 8


def test_what_is_unread_is_read_when_the_run_breaks(scenario: Scenario) -> None:
    observations = scenario.observations(every=100)
    with suppress(KeyError), observations.watch(scenario.state):
        scenario.step(observations, 5.0)
        raise KeyError
    assert scenario.rows()[1]["train/loss"] == 5.0


def test_paused_time_is_no_training_time(scenario: Scenario) -> None:
    observations = scenario.observations(every=2)
    with observations.watch(scenario.state):
        scenario.step(observations)
        with observations.paused():
            scenario.now += 100.0
        scenario.step(observations)
    assert scenario.state.elapsed_s == 2.0
    assert scenario.rows()[2]["train/images_per_s"] == 4.0


class Score:
    """An evaluator that takes ten seconds and gives the same two scores, and notes when it was asked."""

    def __init__(self, scenario: Scenario, *scores: float) -> None:
        self.scenario = scenario
        self.scores = list(scores)
        self.asked_at: list[int] = []

    def evaluate(self, method: Method) -> Mapping[str, float]:
        self.scenario.now += 10.0
        self.asked_at.append(self.scenario.state.step)
        return {"top1": self.scores.pop(0) if self.scores else 0.5, "loss": 1.0}


class Best:
    """A keeper of the best states that notes the scores it gets."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.told: list[tuple[int, Mapping[str, float]]] = []

    def note_scores(self, state: TrainState, scores: Mapping[str, float]) -> None:
        assert not set(scores) & set(self.scenario.journal.row(state.step)), "marked after the score is written"
        self.told.append((state.step, scores))


def evaluations(
    scenario: Scenario,
    observations: Observations,
    evaluators: Mapping[str, tuple[str, Evaluator]],
    *,
    last_step: int = 50,
    features: FeatureCache | None = None,
) -> tuple[Evaluations, list[tuple[int, Mapping[str, float]]]]:
    best = Best(scenario)
    cadences = {name: cadence for name, (cadence, _) in evaluators.items()}
    agenda = Agenda(TIMELINE, last_step, evaluators=cadences)
    asked = {name: evaluator for name, (_, evaluator) in evaluators.items()}
    made = Evaluations(scenario.teller, agenda, asked, observations=observations, best=best, features=features)
    return made, best.told


def test_evaluators_run_when_due_and_at_the_end(scenario: Scenario) -> None:
    observations = scenario.observations(last_step=12)
    often, never = Score(scenario), Score(scenario)
    made, told = evaluations(
        scenario, observations, {"val": ("1 epoch", often), "late": ("never", never)}, last_step=12
    )
    with observations.watch(scenario.state):
        made.run_if_due(scenario.state)
        for _ in range(12):
            scenario.step(observations)
            made.run_if_due(scenario.state)
    assert often.asked_at == [5, 10, 12]
    assert never.asked_at == [12]
    assert [step for step, _ in told] == [5, 10, 12]
    assert told[-1][1] == {"val/top1": 0.5, "val/loss": 1.0, "late/top1": 0.5, "late/loss": 1.0}
    assert scenario.rows()[5]["val/top1"] == 0.5
    assert scenario.state.elapsed_s == 12.0, "evaluation is no training time"


def test_evaluators_of_the_features_are_asked_together(scenario: Scenario) -> None:
    state = scenario.state
    weight = next(state.method.parameters())
    state.ema = ModelEma(state.method)
    with torch.no_grad():
        weight.add_(1)
    shown: list[list[float]] = []

    class Watched(FeatureCache):
        @contextmanager
        def weights_unchanged(self) -> Iterator[None]:
            shown.append([])
            before = weight.detach().clone()
            yield
            assert torch.equal(weight, before)

    class Weight:
        def evaluate(self, method: Method) -> Mapping[str, float]:
            shown[-1].append(weight.mean().item())
            return {"mean": weight.mean().item()}

    asked = {"a": ("1 epoch", Weight()), "b": ("1 epoch", Weight())}
    made, told = evaluations(scenario, scenario.observations(), asked, features=Watched())
    state.step = 5
    made.run_if_due(state)
    (averaged, _), (trained, _) = shown
    assert trained == pytest.approx(averaged + 1)
    assert shown == [[averaged] * 2, [trained] * 2]
    assert list(told[0][1].items()) == [
        ("a_ema/mean", averaged),
        ("a/mean", trained),
        ("b_ema/mean", averaged),
        ("b/mean", trained),
    ]


def test_a_score_that_a_resumed_run_has_already_is_not_made_again(scenario: Scenario) -> None:
    scenario.state.step = 5
    scenario.journal.log(5, 1.0, {"train/loss": 1.0, "val/top1": 0.5}, time_s=5.0)
    known, missing = Score(scenario), Score(scenario)
    asked = {"val": ("1 epoch", known), "knn": ("1 epoch", missing)}
    made, _ = evaluations(scenario, scenario.observations(), asked)
    made.run_if_due(scenario.state)
    made.run_if_due(scenario.state)
    assert known.asked_at == []
    assert missing.asked_at == [5]
    assert set(scenario.rows()[5]) == {"train/loss", "val/top1", "knn/top1", "knn/loss"}


def test_the_reader_sees_each_epoch_with_the_best_score_so_far(scenario: Scenario) -> None:
    observations = scenario.observations()
    made, _ = evaluations(scenario, observations, {"val": ("1 epoch", Score(scenario, 0.9, 0.25))})
    with observations.watch(scenario.state):
        for _ in range(10):
            scenario.step(observations)
            made.run_if_due(scenario.state)
    first, second = (line for line in scenario.screen.getvalue().splitlines() if line.startswith("epoch "))
    assert "epoch 1/10" in first
    assert "val top1 25.00 %" in second
    assert "best val top1 90.00 %" in second


def test_a_log_without_a_number_is_still_json(scenario: Scenario) -> None:
    scenario.steps(scenario.observations(every=1), [math.nan, 1.0])
    for name in ("metrics.jsonl", "events.jsonl"):
        for line in (scenario.folder / name).read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)
