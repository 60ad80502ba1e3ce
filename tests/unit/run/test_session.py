"""What a run directory holds after a session, and what a later session may change."""

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import opsin
from opsin.errors import ConfigError, LockLost, OpsinError, RunError
from opsin.reporting.journal import read_events, read_rows
from opsin.reporting.sinks import TextLog
from opsin.run.numerics import explain_torch_errors
from opsin.run.recipe import fingerprint
from opsin.run.session import FIXED, open_sinks, resume_run, train, train_recipe
from opsin.storage import lock as runlock
from opsin.storage.directory import RunDirectory
from opsin.storage.files import write_atomic
from opsin.storage.listing import last_step
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.precision import configure
from tests.digits_run import STEPS_PER_EPOCH, digits_recipe, train_digits
from tests.story import Calm, Story

pytestmark = pytest.mark.usefixtures("torch_switches")


def run_facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return facts


def test_a_fingerprint_follows_from_every_key_and_nothing_else() -> None:
    recipe = digits_recipe()
    assert fingerprint(recipe) == fingerprint(digits_recipe())
    changes = ("seed=1", "optim.lr=0.02", "model.depth=2", "data.holdout=0.3", "evaluators.val.every=2 epochs")
    prints = {fingerprint(recipe), *(fingerprint(digits_recipe(change)) for change in changes)}
    assert len(prints) == 1 + len(changes)


def test_a_finished_run_leaves_every_file_that_is_promised(tmp_path: Path) -> None:
    train_digits(tmp_path / "run", "log.csv=true")
    found = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    assert found >= {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "events.jsonl",
        "summary.json",
        "encoder.json",
        "confusion.json",
        "model.safetensors",
        "checkpoints",
        "log.csv",
    }
    facts = run_facts(tmp_path / "run")
    assert facts["status"] == "done"
    assert facts["seed"] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 * STEPS_PER_EPOCH
    assert summary["scores"]["val/top1"]["best"] >= summary["scores"]["val/top1"]["last"] > 0
    assert opsin.read(str(tmp_path / "run" / "recipe.yaml")) == digits_recipe("log.csv=true")


def test_two_runs_of_one_recipe_give_equal_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train_digits(tmp_path / name, f"seed={seed}", "epochs=1")
    weights = {path.name: (path / "model.safetensors").read_bytes() for path in tmp_path.iterdir()}
    assert weights["one"] == weights["two"] != weights["other"]


def test_a_run_ended_early_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    train_digits(tmp_path / "straight")
    train_digits(tmp_path / "early", "limits.steps=7")
    resume_run(tmp_path / "early", ["limits.steps=null"], quiet=True)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "early"))
    assert first == second
    steps = [row.step for row in read_rows(tmp_path / "early" / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 2 * STEPS_PER_EPOCH


def test_a_resume_with_another_number_of_threads_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_digits(tmp_path, "epochs=1")
    usual = run_facts(tmp_path)["hardware"]["threads"]
    capsys.readouterr()
    resume_run(tmp_path, ["epochs=1", f"threads={usual + 1}"])
    wanted = f"threads: {usual + 1} instead of {usual} in the session before: sums are rounded differently from here on"
    assert wanted in capsys.readouterr().out
    resume_run(tmp_path, ["epochs=1"])
    assert "in the session before" not in capsys.readouterr().out


def test_the_same_recipe_continues_and_another_is_refused_with_the_difference(tmp_path: Path) -> None:
    train_digits(tmp_path, "epochs=1")
    train_digits(tmp_path, "epochs=1")
    assert [event.kind for event in read_events(tmp_path / "events.jsonl")].count("resumed") == 1
    with pytest.raises(RunError) as caught:
        train_digits(tmp_path, "epochs=1", "optim.lr=0.02")
    assert any("optim.lr: 0.01 -> 0.02" in fault for fault in caught.value.faults)


def test_without_a_checkpoint_a_corrected_recipe_starts_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        train_digits(tmp_path, "batch_size=100000")
    assert run_facts(tmp_path)["status"] == "failed"
    train_digits(tmp_path, "epochs=1")
    assert run_facts(tmp_path)["status"] == "done"


def test_fresh_moves_the_earlier_run_aside(tmp_path: Path) -> None:
    recipe = digits_recipe("epochs=1")
    for fresh in (False, True):
        train_recipe(recipe, tmp_path / "run", name="quickstart", fresh=fresh, quiet=True)
    before = tmp_path / "run.before-1"
    assert (before / "model.safetensors").read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert "resumed" not in [event.kind for event in read_events(tmp_path / "run" / "events.jsonl")]


@pytest.mark.parametrize("out", [".", "sub/.."])
def test_a_run_in_the_working_directory_is_moved_aside_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    train_recipe(digits_recipe("limits.steps=1"), Path(), name="quickstart", quiet=True)
    Path("sub").mkdir()
    run = train_recipe(digits_recipe("limits.steps=2"), Path(out), name="quickstart", fresh=True, quiet=True)
    assert run.directory.path == tmp_path / "run"
    steps = {name: last_step(tmp_path / name / "metrics.jsonl") for name in ("run", "run.before-1")}
    assert steps == {"run": 2, "run.before-1": 1}


def test_fresh_is_refused_before_anything_is_moved_where_the_backup_holds_a_run(tmp_path: Path) -> None:
    recipe = digits_recipe("limits.steps=1", f"backup.path={tmp_path / 'backup'}")
    train_recipe(recipe, tmp_path / "run", name="quickstart", quiet=True)
    for place in ("run", "new"):
        with pytest.raises(RunError, match=r"backup: holds the backup of a run, .* another backup.path, .* nothing"):
            train_recipe(recipe, tmp_path / place, name="quickstart", fresh=True, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "run"]
    elsewhere = digits_recipe("limits.steps=1", f"backup.path={tmp_path / 'other'}")
    train_recipe(elsewhere, tmp_path / "run", name="quickstart", fresh=True, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "other", "run", "run.before-1"]


def test_a_resumed_run_may_change_what_its_state_does_not_depend_on(tmp_path: Path) -> None:
    train_digits(tmp_path, "epochs=1")
    changes = ["epochs=2", "optim.lr=0.005", "batch_size=128", "checkpoints.keep=1"]
    resume_run(tmp_path, changes, quiet=True)
    assert list(find_checkpoints(tmp_path / "checkpoints"))[-1] == 22, "11 steps of 128 images in an epoch, twice"
    assert opsin.read(str(tmp_path / "recipe.yaml")) == digits_recipe("epochs=1", *changes)
    told = (tmp_path / "log.txt").read_text()
    assert all(f"changed: {line}" in told for line in ("epochs: 1.0 -> 2.0", "optim.lr: 0.01 -> 0.005"))


@pytest.mark.parametrize(
    "change", ["seed=1", "data.image_size=16", "model.width=32", "model.name=resnet10t", "optim.name=sgd"]
)
def test_a_run_keeps_the_keys_that_its_state_depends_on(change: str, tmp_path: Path) -> None:
    train_digits(tmp_path, "limits.steps=1")
    with pytest.raises(RunError) as caught:
        resume_run(tmp_path, [change], quiet=True)
    for fault in caught.value.faults:
        assert fault.startswith(f"{tmp_path}: ")
        assert fault.removeprefix(f"{tmp_path}: ").startswith(FIXED)
        assert fault.endswith("a run keeps this key; start a new run with --out")
    assert opsin.read(str(tmp_path / "recipe.yaml")) == digits_recipe("limits.steps=1")


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume"):
        resume_run(tmp_path, [])


def test_python_trains_as_the_command_line_does(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"precision": "fp32", "device": "cpu", "data.workers": 0, "model.width": 16}
    run = train("quickstart", out=tmp_path / "python", limits={"steps": 2}, **keys, **{"log.tensorboard": False})
    assert run.agenda.last_step == 2
    with pytest.raises(ConfigError, match="change a Recipe with model_copy"):
        train(digits_recipe(), out=tmp_path / "other", epochs=1)


def test_a_folder_that_cannot_be_written_is_told_in_words(tmp_path: Path) -> None:
    train_digits(tmp_path, "limits.steps=1")
    (tmp_path / "encoder.json").unlink()
    (tmp_path / "encoder.json").mkdir()  # writing it fails, for root too
    with pytest.raises(RunError) as caught:
        resume_run(tmp_path, ["limits.steps=2"], quiet=True)
    assert str(caught.value) == f"{tmp_path}: cannot be written: Is a directory; make room, or choose another --out"


@pytest.mark.usefixtures("torch_switches")
def test_an_operation_without_a_deterministic_kernel_is_named_with_the_way_out() -> None:
    configure(torch.device("cpu"), "fp32", deterministic=True)
    message = r"deterministic: true: torch has no put_ that .*; use deterministic=false"
    with pytest.raises(ConfigError, match=message), explain_torch_errors(digits_recipe()):
        torch.zeros(2).put_(torch.tensor([0]), torch.tensor([1.0]))


def test_a_failed_session_is_written_down_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(OpsinError) as caught:
        train_digits(tmp_path, "batch_size=100000")
    facts = run_facts(tmp_path)
    assert facts["status"] == "failed"
    assert str(caught.value) in json.dumps(facts)
    assert [event.kind for event in read_events(tmp_path / "events.jsonl")] == ["failed"]


@pytest.fixture
def lease(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A file system without locks; gives a process elsewhere the run in a folder."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    def take_over(path: Path) -> None:
        write_atomic(path / ".lock", json.dumps({"pid": 1, "host": "elsewhere", "since": "now", "token": "x"}).encode())

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(runlock, "_RENEWED_S", 0.001)
    return take_over


def test_a_run_whose_lease_was_taken_over_writes_nothing_more(tmp_path: Path, lease: Callable[[Path], None]) -> None:
    def take_over() -> None:
        while (last_step(path / "metrics.jsonl") or 0) < 3:
            time.sleep(0.001)
        lease(path)

    path = tmp_path / "run"
    other = threading.Thread(target=take_over)
    other.start()
    with pytest.raises(LockLost, match=r"process 1 on elsewhere \(since now\) has taken over this run"):
        train_digits(path, "epochs=1000", "log.every=1", "checkpoints.every=2 steps")
    other.join()
    assert run_facts(path)["status"] == "running"
    events = [event.kind for event in read_events(path / "events.jsonl")]
    assert "failed" not in events
    assert "emergency" not in (path / "events.jsonl").read_text()
    assert json.loads((path / ".lock").read_text())["pid"] == 1, "the other one has it"


def test_the_text_log_of_a_run_that_was_taken_over_gets_no_more_lines(
    tmp_path: Path, lease: Callable[[Path], None]
) -> None:
    with RunDirectory.locked(tmp_path) as directory:
        log = TextLog(directory.path, Calm(), owner=directory)
        log.say("mine")
        lease(tmp_path)
        time.sleep(0.01)
        log.say("not mine")
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith("  mine")


def test_a_missing_package_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    story = Story()
    recipe = digits_recipe("log={csv: true, tensorboard: true, plots: true}")
    sinks = open_sinks(recipe, "digits", tmp_path, TextLog(tmp_path, story), story)
    assert [sink.name for sink in sinks] == ["log.csv", "log.txt"]
    assert story.notices == [
        "tensorboard is not installed: tensorboard/ is not written (pip install tensorboard)",
        "matplotlib is not installed: plots/ is not written (pip install matplotlib)",
    ]
