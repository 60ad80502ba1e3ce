"""A run that is killed or stopped, and goes on, ends in the same bytes as one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opsin.commands.verify import digest, verify
from opsin.errors import ConfigError
from opsin.reporting.journal import Row, read_events, read_rows
from opsin.run.recipe import read
from opsin.run.session import train_recipe
from opsin.storage.directory import RunDirectory
from opsin.storage.listing import last_step
from opsin.training.checkpoints.format import find_checkpoints
from tests.chaos.killed_runs import ROOT, Killer, descendants
from tests.digits_run import BROKEN_UP, CONVNET, OF_THE_MACHINE, VIT, staged

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("torch_switches")]

STEPS = 24
SHORT = (*BROKEN_UP, f"limits.steps={STEPS}")
SMALL = (*SHORT, *VIT, "precision=fp32")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as killer:
        yield killer


def straight(folder: Path, *overrides: str) -> RunDirectory:
    """A run that was left alone."""
    return RunDirectory(
        train_recipe(read("quickstart", overrides), folder / "straight", name="straight", quiet=True).directory.path
    )


def is_equal(run: RunDirectory, other: RunDirectory) -> bool:
    return digest(run) == digest(other)


def learned(run: RunDirectory) -> list[Row]:
    """The rows of the journal without what depends on the speed of the machine."""
    timeless = []
    for row in read_rows(run.metrics):
        timeless_names = (name for name in row.values if not name.startswith(OF_THE_MACHINE))
        values = {name: row.values[name] for name in timeless_names}
        timeless.append(Row(row.step, row.epoch, 0.0, values))
    return timeless


def scores(run: RunDirectory, name: str) -> dict[int, float]:
    return {row.step: row.values[name] for row in read_rows(run.metrics) if name in row.values}


def events(run: RunDirectory, kind: str) -> list[int]:
    return [event.step for event in read_events(run.events) if event.kind == kind]


@pytest.mark.parametrize(
    "overrides",
    [
        (*VIT, "precision=fp32"),
        (*VIT, "precision=bf16", "optim.name=sgd"),
        (*CONVNET, "precision=fp32", "optim.name=sgd"),
        (*CONVNET, "precision=bf16", "checkpoints.every=0.3 epochs", "checkpoints.keep=1"),
        (*VIT, "precision=bf16", "checkpoints.every=0.0005 minutes"),
        (*VIT, *staged(6), "precision=fp32", "optim.betas=[0.9,0.99]"),
        (*CONVNET, *staged(12), "precision=bf16", "optim.name=sgd"),
    ],
    ids=[
        "vit fp32 adamw",
        "vit bf16 sgd",
        "convnet fp32 sgd",
        "convnet bf16 adamw",
        "by the minute",
        "staged vit",
        "staged convnet",
    ],
)
def test_killed_runs_end_in_the_same_bytes(killer: Killer, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = RunDirectory(tmp_path / "killed")
    kills = killer.train_killed(run.path, *SHORT, *overrides, steps=STEPS, kills=2, seed=len(overrides))
    assert len(kills) == 2, kills
    assert is_equal(run, straight(tmp_path, *SHORT, *overrides)), kills


@dataclass(frozen=True)
class Comparison:
    """A run through four kills, and the same run left alone."""

    killed: RunDirectory
    kills: list[dict[str, Any]]
    whole: RunDirectory


@pytest.fixture(scope="module")
def comparison(killer: Killer, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("comparison")
    kills = killer.train_killed(folder / "killed", *SMALL, steps=STEPS, kills=4, seed=4)
    assert killer.train(folder / "whole", *SMALL) == 0
    return Comparison(RunDirectory(folder / "killed"), kills, RunDirectory(folder / "whole"))


def test_a_kill_in_a_checkpoint_write_leaves_the_checkpoint_before_it(comparison: Comparison) -> None:
    kills = comparison.kills
    assert any(kill["in_write"] for kill in kills), "a kill must fall into a write to prove anything"
    assert is_equal(comparison.killed, comparison.whole), kills
    # Every session goes on from the newest checkpoint that the one before it has left.
    assert events(comparison.killed, "resumed") == [kill["newest"] for kill in kills if kill["newest"] is not None]
    leftovers = [path for path in comparison.killed.path.rglob(".*") if path.name != ".lock"]
    assert leftovers == [], "nothing half written is left"


def test_the_journal_of_a_killed_run_is_that_of_a_straight_one(comparison: Comparison) -> None:
    run, whole = comparison.killed, comparison.whole
    rows = list(read_rows(run.metrics))
    assert [row.step for row in rows] == sorted({row.step for row in rows}), "no step stands twice"
    assert sorted(row.time_s for row in rows) == [row.time_s for row in rows]
    assert learned(run) == learned(whole)
    statuses = [session["status"] for session in json.loads(run.run_json.read_text())["sessions"]]
    assert statuses == ["killed"] * len(comparison.kills) + ["done"]
    saved = events(run, "checkpoint")
    assert len(saved) == len(set(saved)), "what a resumed run does again is told once"
    # A kill between a checkpoint and its event loses the event alone.
    assert set(saved) <= {5, 10, 15, 16, 20, STEPS}
    assert events(run, "best") == events(whole, "best")
    assert events(run, "done") == [STEPS]


def test_a_signal_stops_with_status_3_and_the_run_goes_on(killer: Killer, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "stopped")
    assert killer.stop(run.path, *SMALL, signal_number=signal.SIGTERM, after=9) == 3
    (stopped,) = events(run, "stopped")
    assert 9 <= stopped < STEPS
    assert max(find_checkpoints(run.checkpoints)) == stopped
    assert json.loads(run.run_json.read_text())["status"] == "stopped"
    assert not run.model.exists()
    assert killer.train(run.path, *SMALL) == 0
    assert events(run, "resumed") == [stopped]
    assert is_equal(run, straight(tmp_path, *SMALL))


def test_a_kill_between_checkpoint_and_score_costs_the_score_alone(killer: Killer, tmp_path: Path) -> None:
    # Written before the evaluation that kills, not beside it.
    fatal = ("evaluators.fatal.every=1 epoch", "checkpoints.every=1 epoch", "checkpoints.background=false")
    run, whole = RunDirectory(tmp_path / "killed"), straight(tmp_path, *SMALL, "checkpoints.every=1 epoch")
    assert killer.train(run.path, *SMALL, *fatal) == -signal.SIGKILL
    assert max(find_checkpoints(run.checkpoints)) == 16
    assert killer.train(run.path, *SMALL, *fatal) == 0
    assert events(run, "resumed") == [16]
    assert is_equal(run, whole)
    assert scores(run, "fatal/survived") == {16: 1.0, STEPS: 1.0}
    assert scores(run, "val/top1") == scores(whole, "val/top1")


def test_a_killed_run_leaves_no_process_behind(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    overrides = [*SMALL, "limits.steps=null", "epochs=1000", "log.every=1", "data.resident=false", "data.workers=3"]
    command = [sys.executable, "-m", "opsin", "train", "quickstart", *overrides, "--quiet", "--out", str(run.path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            while not last_step(run.metrics):
                assert process.poll() is None, "it ended by itself"
                time.sleep(0.01)
            others = descendants(process.pid)
        finally:
            process.kill()
    assert len(others) >= 4, "three workers and the process that they are forked from"
    end = time.monotonic() + 20
    while any(is_alive(pid) for pid in others):
        assert time.monotonic() < end, "a process has outlived the run"
        time.sleep(0.05)


def test_verify_proves_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert verify("quickstart", [*SMALL, "limits.hours=0.000001"], steps=20, kills=1) == 0
    kill, *hashes, verdict = capfd.readouterr().out.splitlines()
    assert kill.startswith("kill 1: after step ")
    assert len({line.split()[-1] for line in hashes}) == 1
    assert verdict == "equal"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_verify_says_why_there_is_nothing_to_prove(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        verify("quickstart", ["optim.learning_rate=1"], steps=5, kills=1)
    with pytest.raises(ConfigError, match=r"--steps 5 --kills 0: both must be at least 1"):
        verify("quickstart", [], steps=5, kills=0)
    with pytest.raises(ConfigError, match=r"--steps 3 --kills 3: each kill needs steps of its own; ask for --steps 60"):
        verify("quickstart", [], steps=3, kills=3)
    with pytest.raises(ConfigError, match=r"the straight run ended with exit status 2 instead of 0 \(see above\)"):
        verify("quickstart", ["data.path=nowhere"], steps=5, kills=1)
    assert capfd.readouterr().err.startswith("opsin: nowhere: no such file or folder")


def test_verify_proves_nothing_with_fewer_kills_than_asked(capfd: pytest.CaptureFixture[str]) -> None:
    words = r"--steps 90 --kills 2: [01] of the kills fell before the run was done; the recipe ends after 1 steps: more"
    with pytest.raises(ConfigError, match=words):
        verify("quickstart", [*SMALL, "epochs=0.05"], steps=90, kills=2)
    assert "equal" not in capfd.readouterr().out


def test_a_stopped_verify_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opsin", "verify", "quickstart", *SMALL, "epochs=1000", "--steps", "9999"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + 60
            while not any(map(last_step, tmp_path.glob("*/straight/metrics.jsonl"))):
                assert process.poll() is None, "it ended by itself"
                assert time.monotonic() < end
                time.sleep(0.01)
            others = descendants(process.pid)
            process.terminate()
            assert process.wait(timeout=60) == 3
        finally:
            process.kill()
        assert process.stderr is not None
        assert "opsin: SIGTERM: stopped before the end" in process.stderr.read()
    assert others
    assert not any(is_alive(pid) for pid in others)
    assert list(tmp_path.iterdir()) == []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
