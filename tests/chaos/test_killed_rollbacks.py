"""A run with real rollbacks in it, killed anywhere and resumed, ends in the same bytes as one that was left alone."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsin.commands.verify import digest
from opsin.reporting.journal import read_events, read_rows
from opsin.run.recipe import read
from opsin.run.session import train_recipe
from opsin.storage.directory import RunDirectory
from opsin.training.checkpoints.format import find_checkpoints
from tests.chaos import poisoned  # noqa: F401  # makes its method known
from tests.chaos.killed_runs import ROOT, Killer
from tests.digits_run import BROKEN_UP, VIT

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("torch_switches")]

STEPS = 60
GUARDED = (
    *BROKEN_UP,
    *VIT,
    "precision=fp32",
    "epochs=5",
    f"limits.steps={STEPS}",
    "log.every=2",
    "method.name=poisoned",
    "optim.lr=0.003",
    "optim.schedule.warmup_epochs=0",
    "monitors.loss.action=rollback",
    "monitors.loss.patience=1",
    "guard.margin=3 steps",
    "guard.lr_for=10 steps",
)
"""The poison is in some of the batches of the steps 30 to 45; three rollbacks at most lead around it."""


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as killer:
        yield killer


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run that was left alone."""
    folder = tmp_path_factory.mktemp("guarded") / "straight"
    return RunDirectory(train_recipe(read("quickstart", GUARDED), folder, name="straight", quiet=True).directory.path)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))


def rollbacks(run: RunDirectory) -> list[dict[str, object]]:
    return [dict(event.facts) for event in read_events(run.events) if event.kind == "rollback"]


def test_poison_is_found_and_left_out(straight: RunDirectory) -> None:
    (first, *others) = rollbacks(straight)
    assert first["finding"] == "loss_spike"
    assert 30 < int(str(first["since"])) <= 45
    assert [way["attempt"] for way in (first, *others)] == [*range(1, len(others) + 2)]
    losses = [row.values["train/loss"] for row in read_rows(straight.metrics) if "train/loss" in row.values]
    assert max(losses) < 5, "no trace of it is left in the journal"
    assert [row.step for row in read_rows(straight.metrics)][-1] == STEPS


@pytest.mark.parametrize("seed", range(3))
def test_a_run_with_rollbacks_is_killed_and_ends_in_the_same_bytes(
    killer: Killer, straight: RunDirectory, tmp_path: Path, seed: int
) -> None:
    run = RunDirectory(tmp_path / "killed")
    kills = killer.train_killed(run.path, *GUARDED, steps=STEPS, kills=4, seed=seed)
    assert len(kills) == 4, kills
    assert digest(run) == digest(straight), kills
    assert rollbacks(run) == rollbacks(straight), kills


@pytest.mark.parametrize("lost", ["newest", "all"])
def test_lost_checkpoints_cost_time_alone(killer: Killer, straight: RunDirectory, tmp_path: Path, lost: str) -> None:
    run = RunDirectory(tmp_path / "run")
    assert killer.stop(run.path, *GUARDED, signal_number=signal.SIGTERM, after=43) == 3
    found = [*find_checkpoints(run.checkpoints).values()]
    for path in found[-1:] if lost == "newest" else found:
        shutil.rmtree(path)
    assert killer.train(run.path, *GUARDED) == 0
    assert digest(run) == digest(straight)
    assert rollbacks(run) == rollbacks(straight)


def test_starting_over_gives_the_bits_of_a_checkpoint(killer: Killer, tmp_path: Path) -> None:
    unsaved = (*GUARDED, "checkpoints.every=never", "checkpoints.best=null", "ema.decay=0.9")
    over, saved = RunDirectory(tmp_path / "over"), RunDirectory(tmp_path / "saved")
    assert killer.train(over.path, *unsaved) == 0
    assert killer.stop(saved.path, *unsaved, signal_number=signal.SIGTERM, after=20) == 3
    assert killer.train(saved.path, *unsaved) == 0
    gone_back_to = [
        {event.step for event in read_events(run.events) if event.kind == "rollback"} for run in (over, saved)
    ]
    assert gone_back_to[0] == {0}
    assert min(gone_back_to[1]) >= 20
    assert digest(over) == digest(saved)
