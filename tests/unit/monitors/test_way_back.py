"""What a monitor asks to go back to lies before the fault, and not further back than checkpoints are kept."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from opsin.clock.cadence import is_due
from opsin.clock.timeline import Stage, Timeline
from opsin.monitors.collapse import CollapseConfig
from opsin.monitors.gradients import GradientsConfig
from opsin.monitors.loss import LossConfig
from opsin.reporting.console import Console
from opsin.reporting.journal import Journal
from opsin.reporting.teller import RunTeller
from opsin.run.assemble import plan_agenda
from opsin.run.recipe import read
from opsin.training.agenda import Agenda
from opsin.training.alerts import Alerts
from opsin.training.checkpoints.retention import CheckpointConfig, Retention
from opsin.training.monitor import MonitorConfig, RollBack
from tests.story import Calm
from tests.unit.training.tiny_run import fresh

TIMELINE = Timeline([Stage(epochs=100, batch_size=64, steps_per_epoch=22)])

Rows = Iterable[tuple[int, Mapping[str, float]]]


def asked(folder: Path, config: MonitorConfig, rows: Rows) -> RollBack:
    """The rollback that `config` asks for."""
    state, journal = fresh(), Journal(folder, teller=Calm())
    teller = RunTeller(journal, Console(io.StringIO()))
    alerts = Alerts(
        teller, Agenda(TIMELINE, TIMELINE.total_steps, rows=1), {"mine": ("rollback", config.build(TIMELINE))}
    )
    with alerts.watch(state):
        for step, values in rows:
            state.step = step
            journal.log(step, TIMELINE.epoch(step), values, time_s=float(step))
            try:
                alerts.judge(state)
            except RollBack as request:
                return request
    pytest.fail("nothing was found")


def rows_of(values: Callable[[int], Mapping[str, float]], *, every: str = "50 steps") -> Rows:
    """Rows at every 50 steps, at the end of each epoch, and where something is measured."""
    return (
        (step, values(step))
        for step in range(1, TIMELINE.total_steps)
        if step % 50 == 0 or step % 22 == 0 or is_due(every, TIMELINE, step)
    )


def features(std: float, rank: float = 30.0) -> dict[str, float]:
    return {"collapse/student_std": std, "collapse/student_rank": rank, "collapse/vectors": 128.0}


def test_rows_in_which_nothing_was_measured_are_no_good_ones(tmp_path: Path) -> None:
    """Features are measured every 50 steps, and fall together just after a good measurement."""

    def measured(step: int) -> Mapping[str, float]:
        return {"train/loss": 1.0} | (features(0.9 if step < 301 else 0.01) if step % 50 == 0 else {})

    request = asked(tmp_path, CollapseConfig(), rows_of(measured))
    assert (request.finding.since, request.began, request.found) == (350, 300, 400), "rows at 308 and 330 say nothing"


@pytest.mark.parametrize(
    ("config", "name", "bad"), [(LossConfig(), "loss", 99.0), (GradientsConfig(), "grad_norm", 99.0)]
)
def test_rows_without_an_update_are_no_good_ones(tmp_path: Path, config: MonitorConfig, name: str, bad: float) -> None:
    def logged(step: int) -> Mapping[str, float]:
        return {} if 1000 < step < 1050 else {f"train/{name}": 1.0 if step <= 1000 else bad}

    assert asked(tmp_path, config, rows_of(logged)).began == 1000, "not 1034, of which all updates were cancelled"


def test_what_was_never_good_goes_back_to_the_start(tmp_path: Path) -> None:
    """Narrow features that never spread; a narrow network is not a finding by itself in its first steps."""
    assert asked(tmp_path, CollapseConfig(), rows_of(lambda step: features(0.05))).began == 0


def test_good_rows_of_the_warmup_count(tmp_path: Path) -> None:
    course = rows_of(lambda step: features(0.9 if step < 80 else 0.01) if step % 50 == 0 else {})
    assert asked(tmp_path, CollapseConfig(), course).began == 50


def test_a_spell_that_began_again_since_it_got_better_is_all_of_it_bad(tmp_path: Path) -> None:
    def measured(step: int) -> Mapping[str, float]:
        return features(0.9 if step <= 300 else 0.01 if step <= 350 else 0.05) if step % 50 == 0 else {}

    request = asked(tmp_path, CollapseConfig(), rows_of(measured))
    assert (request.finding.since, request.began, request.found) == (400, 300, 450)


BEFORE, TOGETHER, NARROW = features(0.15), features(0.05), features(0.09)
"""Features that tell images apart, that have fallen together, and that are a little narrower than they should be."""


@pytest.mark.parametrize("every", ["50 steps", "7 steps", "130 steps", "1 epoch", "6 epochs"])
@pytest.mark.parametrize("bad", [TOGETHER, NARROW], ids=["together", "narrow"])
def test_a_collapse_is_found_within_the_delay(tmp_path: Path, every: str, bad: Mapping[str, float]) -> None:
    config = CollapseConfig.model_validate({"every": every})
    for onset in range(600, 660, 11):
        folder = tmp_path / str(onset)
        folder.mkdir()

        def measured(step: int, onset: int = onset) -> Mapping[str, float]:
            return (BEFORE if step < onset else bad) if is_due(every, TIMELINE, step) else {}

        request = asked(folder, config, rows_of(measured, every=every))
        assert request.began < onset <= request.found <= request.began + config.delay(50, TIMELINE)


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(patience=5), GradientsConfig()])
def test_what_is_in_every_row_is_found_within_the_delay(tmp_path: Path, config: MonitorConfig) -> None:
    for onset in range(600, 660, 11):
        folder = tmp_path / str(onset)
        folder.mkdir()

        def logged(step: int, onset: int = onset) -> Mapping[str, float]:
            return dict.fromkeys(("train/loss", "train/grad_norm"), 1.0 if step < onset else 99.0)

        request = asked(folder, config, rows_of(logged))
        assert request.began < onset <= request.found <= request.began + config.delay(50, TIMELINE)


STAGES = {
    "one stage": [Stage(20, 64, 500)],
    "shorter epochs later": [Stage(6, 64, 500), Stage(200, 640, 50)],
    "longer epochs later": [Stage(60, 640, 50), Stage(20, 64, 500)],
}


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
def test_a_checkpoint_from_before_the_slowest_trouble_is_kept(tmp_path: Path, stages: list[Stage]) -> None:
    timeline = Timeline(stages)
    recipe = read("quickstart", ["monitors.collapse.action=rollback"])
    monitor = recipe.monitors["collapse"]
    agenda = plan_agenda(recipe, timeline)
    retention = Retention(tmp_path, CheckpointConfig(keep=2), agenda)
    delay = monitor.delay(recipe.log.every, timeline)
    steps: set[int] = set()
    for step in range(50, 5000, 50):
        steps = retention.kept({*steps, step}, step)
        # The slowest that may be found now.
        began = max(0, step - delay)
        first = max(0, began - agenda.margin_steps(began))
        assert first < 50 or min(steps) <= first, step
