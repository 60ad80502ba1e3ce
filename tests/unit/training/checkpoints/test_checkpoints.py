"""Checkpoints are exact, written whole, and the right ones are kept."""

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.errors import Diverged, LockLost, RunError, TrainingError
from opsin.training.checkpoints.format import read_checkpoint
from opsin.training.checkpoints.retention import read_best
from opsin.training.state import TrainState
from tests.conftest import RunOnSmallDisk
from tests.unit.training.tiny_run import Story, bits, equal, flip_byte, fresh, train


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "checkpoints", every="1 epoch")


# --- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_restored_run_ends_with_the_same_bits(story: Story, kind: str, at: int) -> None:
    story.checkpoints.save(train(fresh(kind), to=at), reason="test")
    resumed = Story(story.folder).restore(fresh(kind))
    assert equal(train(resumed, to=20), train(fresh(kind), to=20))


def test_saving_changes_nothing(story: Story) -> None:
    state = fresh()
    for step in range(1, 20):
        story.checkpoints.save(train(state, to=step), reason="test")
    assert equal(state, train(fresh(), to=19))


def test_time_and_loss_scale_come_back(story: Story) -> None:
    state = train(fresh(scaled=True), to=3)
    assert state.loss_scale is not None
    state.loss_scale.update(torch.tensor(0.0))
    state.loss_scale.update(torch.tensor(1.0))
    story.checkpoints.save(state, reason="test")
    again = story.restore(fresh(scaled=True))
    assert again.loss_scale is not None
    assert again.elapsed_s == 180.0
    assert (again.loss_scale.scale.item(), again.loss_scale.good_steps.item()) == (2.0**15, 1)
    # A resume in another precision has no scale, or begins a new one.
    assert story.restore(fresh()).loss_scale is None


def test_settings_of_the_optimizer_are_those_of_the_recipe(story: Story) -> None:
    story.checkpoints.save(train(fresh(weight_decay=0.05), to=3), reason="test")
    again = story.restore(fresh(weight_decay=0.2))
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.2]


def test_plain_torch_can_read_a_checkpoint(story: Story) -> None:
    state = train(fresh(), to=3)
    path = story.checkpoints.save(state, reason="test")
    assert path is not None
    assert sorted(item.name for item in path.iterdir()) == ["manifest.json", "state.pt"]
    content = torch.load(path / "state.pt", weights_only=True)
    assert all(torch.equal(content["method"][name], value) for name, value in state.method.state_dict().items())
    manifest = json.loads((path / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("format", "step", "elapsed_s", "recipe", "optimizer")} == {
        "format": 1,
        "step": 3,
        "elapsed_s": 180.0,
        "recipe": "f00d",
        "optimizer": "AdamW",
    }
    assert manifest["files"]["state.pt"]["bytes"] == (path / "state.pt").stat().st_size


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_checkpoint_loads_on_another_device(tmp_path: Path, kind: str, source: str, target: str) -> None:
    def on(device: str) -> TrainState:
        state = fresh(kind)
        state.method.to(device)
        return state

    saved = on(source)
    for param in saved.method.parameters():
        param.grad = torch.ones_like(param)
    saved.optimizer.step()
    saved.step = 1
    Story(tmp_path).checkpoints.save(saved, reason="test")
    loaded = Story(tmp_path).restore(on(target))
    for one, other in zip(bits(saved), bits(loaded), strict=True):
        assert torch.equal(one.cpu(), other.cpu())
    for param in loaded.method.parameters():
        assert all(value.device == param.device for value in loaded.optimizer.state[param].values())
        param.grad = torch.ones_like(param)
    loaded.optimizer.step()


# --- what is due, and what is kept ----------------------------------------------------------------


def saved_steps(story: Story, *, to: int) -> list[int]:
    state = fresh()
    return [
        step
        for step in range(1, to + 1)
        if story.checkpoints.save_if_due(train(state, to=step), stopping=False) is not None
    ]


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({"every": "1 epoch"}, [5, 10, 15, 17]),
        ({"every": "4 steps"}, [4, 8, 12, 16, 17]),
        ({"every": "6 minutes"}, [6, 12, 17]),  # a step takes one
        ({"every": "never"}, [17]),
        ({"every": "never", "milestones": "2 epochs"}, [10, 17]),
    ],
    ids=lambda value: str(value),
)
def test_due_steps_and_the_last_one_are_saved(tmp_path: Path, settings: dict[str, Any], due: list[int]) -> None:
    assert saved_steps(Story(tmp_path, last_step=17, **settings), to=17) == due


def test_a_stop_is_saved_at_any_step(story: Story) -> None:
    path = story.checkpoints.save_if_due(train(fresh(), to=3), stopping=True)
    assert path == story.folder / "step-00000003"


def test_newest_best_and_milestones_are_kept(tmp_path: Path) -> None:
    story = Story(tmp_path, every="1 step", keep=2, milestones="3 epochs", last_step=18)
    state = fresh()
    for step in range(1, 19):
        story.checkpoints.save_if_due(train(state, to=step))
        story.checkpoints.note_scores(state, {"val/loss": 0.0, "val/top1": 0.9 if step == 7 else 0.1})
    assert story.steps() == [7, 15, 17, 18]
    assert read_best(tmp_path)[0].step == 7


@pytest.mark.parametrize(("mode", "best_step"), [("max", 2), ("min", 3)])
def test_the_first_of_equal_scores_is_the_best(tmp_path: Path, mode: str, best_step: int) -> None:
    story = Story(tmp_path, every="never", best="score", best_mode=mode, keep=1)
    state = fresh()
    for step, score in enumerate([2.0, 4.0, 1.0, 4.0, 1.0, float("nan")], start=1):
        story.checkpoints.mark_best(train(state, to=step), score)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == best_step
    assert best_step in story.steps()


def test_a_best_score_after_the_restored_step_is_forgotten(story: Story) -> None:
    story.checkpoints.save(train(fresh(), to=3), reason="test")
    state = train(fresh(), to=4)
    assert story.checkpoints.mark_best(state, 0.9)
    flip_byte(story.folder / "step-00000004" / "state.pt", 500)
    again = Story(story.folder)
    state = train(again.restore(fresh()), to=4)
    assert again.checkpoints.mark_best(state, 0.9)
    assert read_best(story.folder)[0].step == 4


# --- faults of the disk and of training -------------------------------------------------------------


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """Every write beyond 2 KiB of a file fails, as on a full disk."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("no_large_files")
def test_a_failed_write_leaves_nothing_and_training_goes_on(story: Story) -> None:
    state = train(fresh(), to=5)
    assert story.checkpoints.save_if_due(state) is None
    assert list(story.folder.iterdir()) == []
    (warning,) = story.warnings()
    assert warning == (
        "checkpoint of step 5 was not written: File too large; there is no complete one; "
        "training goes on and tries again at the next due step"
    )
    assert not story.checkpoints.mark_best(state, 0.9)
    with pytest.raises(RunError, match="step 5 could not be written before the stop"):
        story.checkpoints.save_if_due(state, stopping=True)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert story.checkpoints.save_if_due(train(state, to=10)) is not None
    assert story.checkpoints.newest_step == 10


FULL_DISK = """
import sys
from pathlib import Path
from tests.unit.training.tiny_run import Story, fresh, train

folder = Path(sys.argv[1])
story = Story(folder / "checkpoints", every="1 step")
state = train(fresh(width=3000), to=1)
assert story.checkpoints.save_if_due(state) is not None
(folder / "other").write_bytes(bytes(200_000))
state = train(state, to=2)
assert story.checkpoints.save_if_due(state) is None
print(*story.warnings())
assert story.steps() == [1]
(folder / "other").unlink()
assert story.checkpoints.save_if_due(train(state, to=3)) is not None
"""


def test_a_full_file_system_is_named_with_what_is_needed(run_on_small_disk: RunOnSmallDisk) -> None:
    (said,) = run_on_small_disk(FULL_DISK, size="1m")
    assert "checkpoint of step 2 was not written: no space left (needs about 0.4 MiB, 0." in said
    assert "the newest complete one is step 1" in said


def test_an_emergency_saves_a_whole_state_only(story: Story) -> None:
    state = train(fresh(), to=3)
    state.whole = False
    assert story.checkpoints.emergency(state) is None
    state.whole = True
    path = story.checkpoints.emergency(state)
    assert path is not None
    assert read_checkpoint(path).step == 3


@pytest.mark.parametrize(
    ("error", "saved"), [(TrainingError("a worker died"), [3]), (ValueError(), [3]), (Diverged("loss nan"), [])]
)
def test_an_exception_saves_a_state_that_is_worth_it(story: Story, error: Exception, saved: list[int]) -> None:
    for state in (fresh(), train(fresh(), to=3)):
        with pytest.raises(type(error)), story.checkpoints.rescue(state):
            raise error
    assert story.steps() == saved, "a fresh state is none to save"


def test_an_emergency_hides_no_exception(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(torch, "save", broken)
    assert story.checkpoints.emergency(train(fresh(), to=3)) is None
    assert "the device is lost" in story.warnings()[0]
    assert list(story.folder.iterdir()) == []


def test_a_run_that_another_process_has_taken_over_is_not_saved_not_even_in_an_emergency(tmp_path: Path) -> None:
    def check() -> None:
        raise LockLost("taken over")

    story = Story(tmp_path / "checkpoints", check=check)
    state = train(fresh(), to=3)
    with pytest.raises(LockLost):
        story.checkpoints.save(state, reason="test")
    for error in (LockLost("taken over"), OSError("the network")):
        with pytest.raises(type(error)), story.checkpoints.rescue(state):
            raise error
    assert not story.folder.exists()
