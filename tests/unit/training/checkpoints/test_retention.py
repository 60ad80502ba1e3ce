"""Which checkpoints stay: the newest, the best, milestones, the last healthy one; and what goes on a full disk."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from opsin.training.agenda import Agenda
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.checkpoints.retention import CheckpointConfig, Retention, Scored, among_best, read_best
from tests.conftest import RunOnSmallDisk
from tests.unit.training.tiny_run import TIMELINE, Story, equal, flip_byte, fresh, train


def save_each(story: Story, *, to: int, scores: dict[int, float] | None = None) -> None:
    state = fresh()
    for step in range(1, to + 1):
        story.checkpoints.save_if_due(train(state, to=step))
        if scores and step in scores:
            story.checkpoints.note_scores(state, {"val/top1": scores[step]})


SCORES = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.9, 10: 0.1}


@pytest.mark.parametrize(
    ("mode", "count", "best"),
    [("max", 1, [4]), ("max", 3, [4, 8, 6]), ("min", 2, [10, 2]), ("max", 9, [4, 8, 6, 2, 10])],
)
def test_the_n_best_are_kept_in_order(tmp_path: Path, mode: str, count: int, best: list[int]) -> None:
    story = Story(tmp_path, every="1 step", keep=1, best_mode=mode, best_keep=count, last_step=12)
    save_each(story, to=12, scores=SCORES)
    assert story.steps() == sorted([*best, 12])
    assert read_best(tmp_path)[0].step == best[0]
    facts = json.loads((tmp_path / "best.json").read_text())
    assert [facts["step"], *(other["step"] for other in facts.get("others", []))] == best
    told = [facts["step"] for kind, facts in story.events if kind == "best"]
    assert told[-1] == best[0]
    assert set(told) <= ({2, 4} if mode == "max" else {2, 10}), "only what beats all before is news"


def test_a_score_under_another_name_begins_anew() -> None:
    config = CheckpointConfig(best="knn/top1", best_keep=3)
    old, new = Scored(1, "val/top1", 0.9), Scored(2, "knn/top1", 0.1)
    assert among_best([old], new, config) == [new]
    assert among_best([new], new, config) is None, "a step that was scored before the run was killed"
    assert among_best([new], Scored(2, "knn/top1", 0.2), config) == [Scored(2, "knn/top1", 0.2)]


def test_a_resume_forgets_the_scores_of_later_steps_alone(tmp_path: Path) -> None:
    story = Story(tmp_path, every="1 step", keep=1, best_keep=3)
    save_each(story, to=8, scores=SCORES)
    flip_byte(tmp_path / "step-00000008" / "state.pt", 700)
    assert Story(tmp_path).restore(fresh()).step == 6
    facts = json.loads((tmp_path / "best.json").read_text())
    assert [facts["step"], *(other["step"] for other in facts["others"])] == [4, 6]


def make_unreadable(marks: Path) -> None:
    marks.unlink()
    marks.mkdir()


@pytest.mark.parametrize("spoil", [make_unreadable, lambda marks: flip_byte(marks, 0)], ids=["unreadable", "damaged"])
def test_nothing_is_removed_while_it_cannot_be_read_which_are_the_best(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    story = Story(tmp_path, every="1 step", keep=1)
    save_each(story, to=4, scores={2: 0.9, 3: 0.5})
    assert story.steps() == [2, 4]
    spoil(tmp_path / "best.json")
    state = train(fresh(), to=5)
    story.checkpoints.save_if_due(state)
    story.checkpoints.note_scores(state, {"val/top1": 0.1})
    assert story.steps() == [2, 4, 5]
    assert len(story.warnings()) == 2
    assert all("best.json: " in warning for warning in story.warnings())
    assert story.warnings()[0].endswith("no checkpoint is removed meanwhile")


def test_damaged_marks_are_made_anew_from_the_log(tmp_path: Path) -> None:
    save_each(Story(tmp_path, every="1 step", keep=2, best_keep=2), to=8, scores=SCORES)
    marks = (tmp_path / "best.json").read_bytes()
    flip_byte(tmp_path / "best.json", 0)
    again = Story(tmp_path, every="1 step", keep=1, best_keep=2, scores={1: 0.99, **SCORES})
    again.restore(fresh())
    assert (tmp_path / "best.json").read_bytes() == marks, "of step 1 there is no checkpoint"
    (warning,) = again.warnings()
    assert warning.endswith("a resume restores it from the log: step 4, step 8")
    again.checkpoints.save(train(fresh(), to=9), reason="test")
    assert again.steps() == [4, 8, 9]


def test_there_is_always_a_healthy_one(tmp_path: Path) -> None:
    story = Story(tmp_path, every="1 step", keep=1, best=None, margin=4)
    state = fresh()
    for step in range(1, 20):
        story.checkpoints.save(train(state, to=step), reason="test")
        old_enough = [number for number in story.steps() if number <= step - 4]
        assert bool(old_enough) == (step > 4), step
        # Besides, the newest, and the one that will be old enough next: what is kept does not grow older and older.
        assert len(story.steps()) <= 3
        assert all(step - number <= 8 for number in story.steps())


def test_a_policy_without_rollbacks_keeps_none_for_them(tmp_path: Path) -> None:
    retention = Retention(tmp_path, CheckpointConfig(keep=2), Agenda(TIMELINE, 50, milestones="10 steps"))
    assert retention.kept(range(1, 25), present=24) == {10, 20, 23, 24}


def test_what_was_gone_back_over_is_never_loaded_and_the_newest_of_it_stays_until_the_next(tmp_path: Path) -> None:
    story = Story(tmp_path, every="1 step", keep=9)
    save_each(story, to=5, scores={4: 0.5})
    for step in range(1, 6):  # written at times that no file system takes for one
        os.utime(tmp_path / f"step-0000000{step}", (step, step))
    assert story.checkpoints.healthy(3) == tmp_path / "step-00000003"
    assert story.checkpoints.healthy(0) is None
    story.checkpoints.retire_after(3)
    assert story.checkpoints.newest_step is None
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"step-0000000{n}" for n in (1, 2, 3)] + [f"unhealthy-step-0000000{n}" for n in (4, 5)]
    again = Story(tmp_path, every="1 step", keep=9, last_step=6)
    state = again.restore(fresh())
    assert equal(state, train(fresh(), to=3))
    again.checkpoints.save(train(state, to=4), reason="test")
    assert unhealthy(tmp_path) == [5]
    again.checkpoints.retire_after(3)
    again.checkpoints.save(again.restore(fresh()), reason="test")
    assert unhealthy(tmp_path) == [5, 4], "nothing was saved"
    again.checkpoints.save(train(fresh(), to=4), reason="test")
    assert unhealthy(tmp_path) == [4], "the one that was written last"
    again.checkpoints.save(train(fresh(), to=6), reason="last step")
    assert unhealthy(tmp_path) == []


def unhealthy(folder: Path) -> list[int]:
    return sorted((int(path.name[-8:]) for path in folder.glob("unhealthy-step-*")), reverse=True)


def test_a_full_disk_takes_what_was_gone_back_over_first(tmp_path: Path) -> None:
    story = Story(tmp_path, every="1 step", keep=9)
    save_each(story, to=2)
    story.checkpoints.retire_after(1)
    retention = Retention(tmp_path, CheckpointConfig(keep=9), Agenda(TIMELINE, 50))
    assert retention.superfluous(2) == []
    assert retention.prune(2, keep_unhealthy=False) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


FULL_DISK = """
import sys
from pathlib import Path
from tests.unit.training.tiny_run import TIMELINE, Story, fresh, train

story = Story(Path(sys.argv[1], "checkpoints"), every="1 step", keep=2, background=True, make_room=sys.argv[2] == "yes")
state = fresh(width=3000)  # 0.45 MiB of 1.2: two fit, three do not
for step in (1, 2, 3):
    story.checkpoints.save_if_due(train(state, to=step))
    story.checkpoints.wait()
print(story.steps(), sorted(path.name for path in story.folder.iterdir()))
print(*story.warnings())
"""


@pytest.mark.parametrize(("make_room", "steps"), [("yes", [2, 3]), ("no", [1, 2])])
def test_a_full_disk_is_noticed_beforehand_and_room_made_if_wanted(
    run_on_small_disk: RunOnSmallDisk, make_room: str, steps: list[int]
) -> None:
    first, warning = run_on_small_disk(FULL_DISK, make_room, size="1200k")
    assert first == f"{steps} {[f'step-{step:08d}' for step in steps]}", "nothing half written is left"
    said = "checkpoint of step 3 was not written: no space left (needs about 0.4 MiB, 0.3 MiB are free)"
    assert warning.startswith(said) == (make_room == "no")


def test_the_newest_is_not_removed_for_room_even_where_one_is_kept(tmp_path: Path) -> None:
    story = Story(tmp_path, every="1 step", keep=1)
    save_each(story, to=1)
    newest = list(find_checkpoints(tmp_path).values())
    retention = Retention(tmp_path, CheckpointConfig(keep=1), Agenda(TIMELINE, 50))
    assert retention.superfluous(2) == newest, "it will be replaced"
    assert retention.prune(2, spared=newest) == []
    assert story.steps() == [1]
