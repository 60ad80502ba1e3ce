"""`opsin checkpoints`: what is stored is shown and verified, what is not needed goes, an older state comes back."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from opsin.commands.main import main
from opsin.run.recipe import read
from opsin.settings.text import to_yaml
from opsin.storage.directory import RunDirectory
from opsin.storage.files import remove_whole
from tests.unit.training.tiny_run import Story, equal, flip_byte, fresh, train


def begin(path: Path, *overrides: str) -> None:
    yaml = to_yaml(read("quickstart", overrides), comments=False)
    with RunDirectory.prepare(path, fresh=False) as run:
        run.take_recipe(yaml)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 5 (a milestone), 10 (the best), 11, 12 and 13, which the recipe keeps."""
    path = tmp_path / "run"
    begin(path, "checkpoints.keep=3", "checkpoints.milestones=1 epoch")
    story = Story(path / "checkpoints", every="1 step", keep=3, milestones="1 epoch", margin=1)
    state = fresh()
    for step in (5, 10, 11, 12, 13):
        story.checkpoints.save(train(state, to=step), reason="test")
        if step == 10:
            story.checkpoints.mark_best(state, 0.75)
    return path


class Command:
    """The command line, as a user has it."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *arguments: str | Path) -> tuple[int, Sequence[str], str]:
        """Exit status, lines of the result, and what was said beside it."""
        status = main(["checkpoints", *map(str, arguments)])
        captured = self._capfd.readouterr()
        return status, captured.out.splitlines(), captured.err


@pytest.fixture
def opsin(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def names(path: Path) -> list[str]:
    return sorted(item.name for item in (path / "checkpoints").iterdir() if item.is_dir())


def step_names(*steps: int, prefix: str = "") -> list[str]:
    return [f"{prefix}step-{step:08d}" for step in steps]


def test_the_list_says_what_there_is(run: Path, opsin: Command) -> None:
    status, (head, *rows), _ = opsin(run)
    assert status == 0
    assert re.split(r"  +", head) == ["checkpoint", "epoch", "best", "MiB", "age", "healthy", "compressed", "verified"]
    cells = [re.split(r"  +", row) for row in rows]
    assert [row[0] for row in cells] == step_names(5, 10, 11, 12, 13)
    assert [row[1] for row in cells] == ["1", "2", "2.2", "2.4", "2.6"]
    assert [row[2] for row in cells] == ["-", "val/top1 0.75", "-", "-", "-"]
    assert [row[5] for row in cells] == ["yes", "yes", "yes", "yes", "-"]
    assert {tuple(row[6:]) for row in cells} == {("no", "sizes")}
    first, *_ = opsin(run, "--json")[1]
    assert json.loads(first)["step"] == 5


def test_verify_hashes_everything_and_fails_on_damage(run: Path, opsin: Command) -> None:
    status, (_, *rows), _ = opsin(run, "verify")
    assert status == 0
    assert all(row.endswith("sha256") for row in rows)
    flip_byte(run / "checkpoints" / "step-00000011" / "state.pt", 700)
    assert opsin(run, "list")[0] == 0, "the sizes are right"
    status, (_, *rows), said = opsin(run, "verify")
    assert status == 2
    assert [row.endswith("DAMAGED") for row in rows] == [False, False, True, False, False]
    assert re.fullmatch(r"opsin: .*step-00000011: state\.pt: sha256 is \w+\.\.\., \w+\.\.\. was written\n", said)
    (run / "checkpoints" / "step-00000012" / "state.pt").write_bytes(b"")
    assert opsin(run, "list")[1][4].endswith("DAMAGED")


def test_prune_shows_and_removes_with_yes_alone(run: Path, opsin: Command) -> None:
    before = names(run)
    assert opsin(run, "prune")[:2] == (0, ["nothing to remove: the recipe keeps all of them"])
    # A rollback may need 12, the newest that is a step older than the newest.
    assert opsin(run, "prune", "--keep", "1")[:2] == (0, ["would remove step-00000011", "--yes removes them"])
    assert names(run) == before
    assert opsin(run, "prune", "--keep", "1", "--yes")[:2] == (0, ["removed step-00000011"])
    assert names(run) == step_names(5, 10, 12, 13)


def test_prune_removes_nothing_where_the_newest_is_damaged(run: Path, opsin: Command) -> None:
    flip_byte(run / "checkpoints" / "step-00000013" / "state.pt", 700)
    before = names(run)
    status, _, said = opsin(run, "prune", "--keep", "1", "--yes")
    assert (status, names(run)) == (2, before)
    assert "nothing was removed: opsin checkpoints" in said


def test_restore_takes_an_older_step_and_back_again(run: Path, opsin: Command) -> None:
    status, (said,), _ = opsin(run, "restore", "11")
    assert status == 0
    assert said == (
        f"{run}: step 11 is the newest checkpoint now; opsin resume {run} goes on from it; "
        f"later ones are kept as later-step-... until opsin checkpoints {run} prune --yes"
    )
    assert names(run) == sorted([*step_names(5, 10, 11), *step_names(12, 13, prefix="later-")])
    assert equal(Story(run / "checkpoints").restore(fresh()), train(fresh(), to=11))
    assert opsin(run, "restore", "13")[0] == 0
    assert equal(Story(run / "checkpoints").restore(fresh()), train(fresh(), to=13))
    assert names(run) == sorted([*step_names(5, 10, 11, 13), *step_names(12, prefix="later-")])
    assert opsin(run, "prune", "--yes")[1] == ["removed later-step-00000012"]


def test_restore_refuses_what_cannot_be(run: Path, opsin: Command) -> None:
    flip_byte(run / "checkpoints" / "step-00000010" / "state.pt", 700)
    before = names(run)
    for arguments, fault in (
        (("restore", "7"), "has no checkpoint of step 7; there are: 5, 10, 11, 12, 13"),
        (("restore", "10"), "step-00000010: state.pt: sha256 is"),
        (("restore",), "restore needs a STEP"),
        (("list", "5"), "list takes no STEP"),
        (("prune", "--keep", "0"), "--keep 0 does not fit"),
    ):
        status, _, said = opsin(run, *arguments)
        assert (status, names(run)) == (2, before)
        assert fault in said
    assert opsin(run, "restore", "11")[0] == 0
    story = Story(run / "checkpoints", every="1 step", keep=9)
    story.checkpoints.save(train(story.restore(fresh()), to=12), reason="test")
    assert "later-step-00000012 is there from an earlier restore" in opsin(run, "restore", "11")[2]


def test_a_run_that_is_being_written_is_left_alone(run: Path, opsin: Command) -> None:
    with RunDirectory.locked(run):
        assert opsin(run)[0] == 0
        for action in (("restore", "11"), ("prune", "--yes")):
            status, _, said = opsin(run, *action)
            assert status == 2
            assert "is writing this run" in said


def test_a_folder_without_checkpoints_is_told_from_one_without_a_run(tmp_path: Path, opsin: Command) -> None:
    assert "holds no run" in opsin(tmp_path)[2]
    begin(tmp_path / "run")
    assert "has no checkpoints yet" in opsin(tmp_path / "run")[2]


def meanwhile(monkeypatch: pytest.MonkeyPatch, moment: str, checkpoint: Path, then: Callable[[], object]) -> None:
    """Another process does `then`, once, at a moment while `checkpoint` is looked at."""
    read, count = Path.read_bytes, Path.iterdir
    left = [then]

    def read_bytes(path: Path) -> bytes:
        if path.parent != checkpoint or moment == "before its files are counted" or not left:
            return read(path)
        if moment == "before its manifest is read":
            left.pop()()
            return read(path)
        data = read(path)
        left.pop()()
        return data

    def iterdir(path: Path) -> Iterator[Path]:
        if path == checkpoint and moment == "before its files are counted" and left:
            left.pop()()
        return count(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(Path, "iterdir", iterdir)


MOMENTS = ("before its manifest is read", "after its manifest is read", "before its files are counted")


@pytest.mark.parametrize("action", ["list", "verify"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_what_is_removed_while_it_is_looked_at_is_left_out(
    run: Path, opsin: Command, monkeypatch: pytest.MonkeyPatch, moment: str, action: str
) -> None:
    doomed = run / "checkpoints" / "step-00000011"
    meanwhile(monkeypatch, moment, doomed, lambda: remove_whole(doomed))
    status, (_, *rows), said = opsin(run, action)
    assert (status, said) == (0, "")
    assert [row.split()[0] for row in rows] == step_names(5, 10, 12, 13)
    assert not any("DAMAGED" in row for row in rows)


def test_what_is_replaced_while_it_is_looked_at_is_looked_at_again(
    run: Path, opsin: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train(fresh(width=9), to=12)
    story = Story(run / "checkpoints", keep=9)
    replaced = run / "checkpoints" / "step-00000012"
    meanwhile(monkeypatch, MOMENTS[1], replaced, lambda: story.checkpoints.save(other, reason="rollback"))
    status, (_, *rows), said = opsin(run, "verify")
    assert (status, said) == (0, "")
    assert [row.split()[-1] for row in rows] == ["sha256"] * 5


def test_a_replacement_that_was_broken_off_is_seen_and_finished(run: Path, opsin: Command) -> None:
    newest = run / "checkpoints" / "step-00000013"
    newest.rename(newest.with_name(".replacing-step-00000013"))
    status, (_, *rows), said = opsin(run, "verify")
    assert (status, said) == (0, "")
    assert [row.split()[0] for row in rows] == step_names(5, 10, 11, 12, 13)
    assert not newest.exists(), "who only looks changes nothing"
    assert opsin(run, "restore", "13")[0] == 0
    assert names(run) == step_names(5, 10, 11, 12, 13)


def test_prune_removes_what_a_rollback_went_back_over(run: Path, opsin: Command) -> None:
    Story(run / "checkpoints").checkpoints.retire_after(12)
    assert opsin(run, "prune")[1] == ["would remove unhealthy-step-00000013", "--yes removes them"]
    assert opsin(run, "prune", "--yes")[1] == ["removed unhealthy-step-00000013"]
