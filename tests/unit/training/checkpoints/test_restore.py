"""Restoring takes the newest valid checkpoint, and says what is wrong with the others."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from opsin.errors import CheckpointError, RunError
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.state import TrainState
from tests.unit.training.tiny_run import Story, bits, equal, flip_byte, fresh, train


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "checkpoints", every="1 epoch")


def test_without_checkpoints_the_state_is_fresh(story: Story) -> None:
    assert equal(story.restore(fresh()), fresh())
    assert story.checkpoints.newest_step is None


def test_restoring_tells_where_it_goes_on(story: Story) -> None:
    story.checkpoints.save(train(fresh(), to=3), reason="test")
    again = Story(story.folder)
    again.restore(fresh())
    assert again.events == [("resumed", {"step": 3, "elapsed_s": 180.0, "recipe_changed": False})]


def test_a_run_that_is_past_the_end_of_its_recipe_is_refused(story: Story) -> None:
    story.checkpoints.save(train(fresh(), to=3), reason="test")
    shorter = Story(story.folder, last_step=2)
    with pytest.raises(CheckpointError, match="the run has done 3 steps, the recipe ends after 2; ask for more epochs"):
        shorter.restore(fresh())
    assert Story(story.folder, last_step=3).restore(fresh()).step == 3


def test_leftovers_of_killed_writers_are_removed(story: Story) -> None:
    for name in (".writing-3-4711", ".removing-step-00000002-4711"):
        (story.folder / name).mkdir(parents=True)
        (story.folder / name / "state.pt").write_bytes(b"half")
    assert story.restore(fresh()).step == 0
    assert list(story.folder.iterdir()) == []


@pytest.mark.parametrize("place", ["leftovers", "marks"])
def test_a_disk_that_fails_is_told_with_a_way_out(story: Story, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    story.checkpoints.save(train(fresh(), to=3), reason="test")
    if place == "leftovers":
        (story.folder / ".best.json.4711.writing").mkdir()
    else:
        later = [{"step": 2, "score": 0.5}]
        (story.folder / "best.json").write_text(
            json.dumps({"step": 9, "name": "val/top1", "score": 1, "others": later})
        )

        def full(path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("opsin.training.checkpoints.retention.write_atomic", full)
    with pytest.raises(RunError, match=r"checkpoints: cannot be written: .*; make room, or choose another --out"):
        Story(story.folder).restore(fresh())


def test_unreadable_marks_are_told_with_a_way_out(story: Story) -> None:
    (story.folder / "best.json").mkdir(parents=True)
    with pytest.raises(RunError, match=r"best\.json: cannot be read: Is a directory; .* delete it to go on"):
        story.restore(fresh())


@pytest.fixture
def two(story: Story) -> Story:
    state = fresh()
    for step in (3, 6):
        story.checkpoints.save(train(state, to=step), reason="test")
    return Story(story.folder)


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_any_flipped_byte_is_found_and_the_checkpoint_before_is_taken(two: Story, name: str) -> None:
    path = two.folder / "step-00000006" / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        path.parent.mkdir(exist_ok=True)
        flip_byte(path, position)
        state = two.restore(fresh())
        damaged = two.folder / "damaged-step-00000006"
        # A line break that became another blank says the same.
        assert state.step == 3 or json.loads(path.read_text()) == json.loads(whole), position
        if damaged.exists():
            damaged.rename(path.parent)
        path.write_bytes(whole)
    assert two.restore(fresh()).step == 6


def test_the_warning_says_what_is_damaged_and_what_is_taken(two: Story) -> None:
    flip_byte(two.folder / "step-00000006" / "state.pt", 700)
    assert equal(two.restore(fresh()), train(fresh(), to=3))
    (warning,) = two.warnings()
    assert "step-00000006: state.pt: sha256 is " in warning
    assert "going back to step 3" in warning
    # The place is free again, and nothing was deleted.
    two.checkpoints.save(train(fresh(), to=6), reason="test")
    assert two.steps() == [3, 6]
    assert (two.folder / "damaged-step-00000006").is_dir()


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_missing_and_cut_files_are_damage(two: Story, name: str, damage: str) -> None:
    path = two.folder / "step-00000006" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -100 if damage == "cut" else 0])
    assert two.restore(fresh()).step == 3
    assert name in two.warnings()[0] or "JSONDecodeError" in two.warnings()[0]


def test_nothing_valid_is_an_error_with_a_line_for_each(two: Story) -> None:
    for path in find_checkpoints(two.folder).values():
        flip_byte(path / "state.pt", 700)
    with pytest.raises(CheckpointError) as caught:
        two.restore(fresh())
    newest, oldest, way_out = caught.value.faults
    assert ("step-00000006" in newest, "step-00000003" in oldest, "--fresh" in way_out) == (True, True, True)
    assert two.steps() == [3, 6]


def test_a_too_new_checkpoint_is_an_error_and_not_passed_over(two: Story) -> None:
    path = two.folder / "step-00000006" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(CheckpointError, match=r"too new: format 3, this opsin .* reads up to 2; upgrade opsin"):
        two.restore(fresh())
    assert two.steps() == [3, 6]


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (fresh(width=9), r"layers\.0\.weight, .* and 4 more of another shape"),
        (fresh("sgd"), "holds the state of AdamW, not of SGD"),
    ],
    ids=["width", "optimizer"],
)
def test_a_checkpoint_of_another_model_is_an_error_and_leaves_the_state(
    two: Story, other: TrainState, fault: str
) -> None:
    before = [tensor.clone() for tensor in bits(other)]
    with pytest.raises(CheckpointError, match=fault):
        two.restore(other)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(other), strict=True))


def test_parameter_groups_must_be_the_same(two: Story) -> None:
    state = fresh()
    params = list(state.method.parameters())
    state.optimizer = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], fused=True)
    with pytest.raises(CheckpointError, match=r"parameter groups of \[6\] tensors, not of \[2, 4\]"):
        two.restore(state)
