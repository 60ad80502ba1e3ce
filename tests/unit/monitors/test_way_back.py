"""What a monitor asks to go back to lies before the trouble."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from opsin.console import Console
from opsin.monitors.collapse import CollapseConfig
from opsin.monitors.gradients import GradientsConfig
from opsin.monitors.loss import LossConfig
from opsin.reporting import Journal
from opsin.timeline import Stage, Timeline
from opsin.training.alerts import Alerts, MonitorConfig, RollBack
from tests.unit.training.tiny_run import fresh

TIMELINE = Timeline([Stage(epochs=100, batch_size=64, steps_per_epoch=22)])

Rows = Iterable[tuple[int, Mapping[str, float]]]


def asked(folder: Path, config: MonitorConfig, rows: Rows) -> RollBack:
    """The rollback that `config` asks for."""
    state, journal = fresh(), Journal(folder, warn=pytest.fail)
    alerts = Alerts(journal, TIMELINE, Console(io.StringIO()), {"mine": ("rollback", config.build(TIMELINE))})
    with pytest.raises(RollBack) as caught, alerts.watch(state):
        for step, values in rows:
            state.step = step
            journal.log(step, TIMELINE.epoch(step), values, time_s=float(step))
            alerts.judge(state)
    return caught.value


def rows_of(values: Callable[[int], Mapping[str, float]]) -> Rows:
    """Rows at every 50 steps, and at the end of each epoch."""
    return ((step, values(step)) for step in range(1, TIMELINE.total_steps) if step % 50 == 0 or step % 22 == 0)


def features(std: float, rank: float = 30.0) -> Mapping[str, float]:
    return {"collapse/student_std": std, "collapse/student_rank": rank, "collapse/vectors": 128.0}


def test_rows_in_which_nothing_was_measured_are_no_good_ones(tmp_path: Path) -> None:
    """Features are measured every 50 steps, and fall together just after a good measurement."""

    def measured(step: int) -> Mapping[str, float]:
        return {"train/loss": 1.0} | (features(0.9 if step < 301 else 0.01) if step % 50 == 0 else {})

    trouble = asked(tmp_path, CollapseConfig(), rows_of(measured))
    assert (trouble.finding.since, trouble.began, trouble.found) == (350, 300, 400), "rows at 308 and 330 say nothing"


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

    trouble = asked(tmp_path, CollapseConfig(), rows_of(measured))
    assert (trouble.finding.since, trouble.began, trouble.found) == (400, 300, 450)
