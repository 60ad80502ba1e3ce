import json
import shutil
from pathlib import Path

import pytest

from opsin.errors import ConfigError, RunError
from opsin.storage.backup.catalog import marked_steps, read_index, read_mark
from opsin.storage.backup.open import Folder
from opsin.storage.backup.restore import restore
from opsin.storage.backup.store import Entry, StoreError
from tests.story import Story
from tests.unit.storage.backup.small_run import (
    Interrupted,
    Quiet,
    content,
    interrupting,
    mirror,
    write_checkpoint,
    write_run,
)


def restored(place: Path, folder: Path) -> dict[str, bytes]:
    restore(str(place), folder, Quiet())
    return content(folder)


def test_a_restored_run_directory_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10, 20), tmp_path / "backup"
    (run / "checkpoints" / "best.json").write_text('{"step": 10}')
    mirror(run, place).sync()
    assert restored(place, tmp_path / "again") == content(run)


def test_a_second_pass_sends_what_changed_and_nothing_else(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    mirror(run, place).sync()
    before = {path: path.stat().st_ino for path in place.rglob("*") if path.is_file()}
    # Another process, which remembers nothing.
    mirror(run, place).sync()
    assert {path: path.stat().st_ino for path in place.rglob("*") if path.is_file()} == before
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2}\n')
    mirror(run, place).sync()
    after = {path: path.stat().st_ino for path in place.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before[path]} == {"metrics.jsonl", "backup.json"}


def test_what_the_run_removes_is_removed_there_and_the_mark_goes_first(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10, 20), tmp_path / "backup"
    (run / "model.safetensors").write_bytes(b"weights")
    copying = mirror(run, place)
    copying.sync()
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    (run / "model.safetensors").unlink()
    write_checkpoint(run, 30)
    copying.sync()
    assert marked_steps(Folder(place)) == [20, 30]
    assert not (place / "checkpoints" / "step-00000010").exists()
    assert restored(place, tmp_path / "again") == content(run)


def test_with_keep_all_only_what_a_rollback_set_aside_is_removed(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10, 20, 30), tmp_path / "backup"
    copying = mirror(run, place, keep="all")
    copying.sync()
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    (run / "checkpoints" / "step-00000030").rename(run / "checkpoints" / "unhealthy-step-00000030")
    write_checkpoint(run, 20, b"with a detour")
    copying.sync()
    assert marked_steps(Folder(place)) == [10, 20]
    assert (place / "checkpoints" / "step-00000020" / "state.pt").read_bytes() == b"with a detour"
    assert not any("unhealthy" in name for name in Folder(place).names())


def test_the_last_checkpoint_there_outlives_all_here(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    copying = mirror(run, place)
    copying.sync()
    shutil.rmtree(run / "checkpoints")
    copying.sync()
    assert marked_steps(Folder(place)) == [10]


def test_a_removal_that_was_missed_is_made_up_by_the_next_process(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10, 20), tmp_path / "backup"
    mirror(run, place).sync()
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    mirror(run, place).sync()
    assert marked_steps(Folder(place)) == [20]


@pytest.mark.parametrize("last", ["step-00000020/state.pt", "step-00000020/manifest.json", "step-00000020.json"])
def test_a_checkpoint_that_is_half_there_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    mirror(run, place).sync()
    write_checkpoint(run, 20)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", staticmethod(interrupting(Folder(place).put, last)))
        with pytest.raises(Interrupted):
            mirror(run, place).sync()
    assert marked_steps(Folder(place)) == [10]
    assert restore(str(place), tmp_path / "early", Quiet()).step == 10
    mirror(run, place).sync()
    assert restored(place, tmp_path / "again") == content(run)


def test_logs_are_there_before_the_checkpoint_that_they_lead_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = write_run(tmp_path / "run"), tmp_path / "backup"
    sent: list[str] = []
    put = Folder.put

    def noting(self: Folder, name: str, chunks: object, **facts: object) -> None:
        put(self, name, chunks, **facts)  # type: ignore[arg-type]
        sent.append(name)

    monkeypatch.setattr(Folder, "put", noting)
    write_checkpoint(run, 10)
    mirror(run, place).sync()
    assert sent[-1] == "checkpoints/step-00000010.json"
    assert sent.index("backup.json") < sent.index("metrics.jsonl") < len(sent) - 1


def test_a_checkpoint_that_the_run_removes_while_it_waits_is_sent(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run"), tmp_path / "backup"
    copying = mirror(run, place)
    copying.stage(write_checkpoint(run, 10))
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    copying.sync()
    assert (read_mark(Folder(place), 10) or {}).keys() == {"state.pt", "manifest.json"}
    assert not list((run / ".backup").rglob("state.pt")), "what was sent is let go"


def test_an_outage_holds_on_to_one_removed_checkpoint_at_most(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    copying = mirror(run, tmp_path / "not mounted" / "backup")
    for step in range(10, 60, 10):
        copying.stage(write_checkpoint(run, step))
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
        with pytest.raises(StoreError, match=r"there is no folder .*not mounted"):
            copying.sync()
        assert len(list((run / ".backup").rglob("state.pt"))) == 1
    (tmp_path / "not mounted").mkdir()
    copying.sync()
    assert marked_steps(Folder(tmp_path / "not mounted" / "backup")) == [50]
    assert not list((run / ".backup").rglob("state.pt"))


def test_a_damaged_checkpoint_is_told_and_never_marked(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10, 20), tmp_path / "backup"
    state = run / "checkpoints" / "step-00000020" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"!")
    assert mirror(run, place).sync() == ["the checkpoint of step 20 is damaged here; it was not sent"]
    assert marked_steps(Folder(place)) == [10]
    assert not (place / "checkpoints" / "step-00000020" / "state.pt").exists()


def test_another_run_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "backup"
    mirror(write_run(tmp_path / "run", 10), place).sync()
    before = content(place)
    with pytest.raises(RunError, match="holds the backup of another run"):
        mirror(write_run(tmp_path / "other", 20), place).sync()
    assert content(place) == before


def test_a_run_that_went_on_elsewhere_is_not_overwritten(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    mirror(run, place).sync()
    restore(str(place), tmp_path / "elsewhere", Quiet())
    write_checkpoint(tmp_path / "elsewhere", 20)
    mirror(tmp_path / "elsewhere", place).sync()
    with pytest.raises(RunError, match=r"has a checkpoint of step 20, .*run ends with step 10: .* opsin restore"):
        mirror(run, place).sync()


def test_a_run_that_was_restored_to_an_earlier_step_goes_its_own_way(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10, 20), tmp_path / "backup"
    mirror(run, place).sync()
    assert restore(str(place), tmp_path / "again", Story(), step=10).step == 10
    write_checkpoint(tmp_path / "again", 15)
    mirror(tmp_path / "again", place).sync()
    assert marked_steps(Folder(place)) == [10, 15]


def test_what_is_left_out_is_not_copied(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    copying = mirror(run, place, leave_out=("plots/*", "*.yaml"))
    copying.sync()
    assert content(run).keys() - content(place).keys() == {"plots/loss.png"}
    assert not copying.missing()


def test_the_backup_is_not_in_the_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is in the run directory"):
        mirror(write_run(tmp_path / "run"), tmp_path / "run" / "backup")


def test_the_index_lists_every_content_that_may_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, place = write_run(tmp_path / "run"), tmp_path / "backup"
    mirror(run, place).sync()
    old = content(place)["metrics.jsonl"]
    (run / "metrics.jsonl").write_text('{"step": 2}\n')
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", staticmethod(interrupting(Folder(place).put, "metrics.jsonl")))
        with pytest.raises(Interrupted):
            mirror(run, place).sync()
    index = read_index(Folder(place))
    assert index is not None
    assert len(index.files["metrics.jsonl"]) == 2
    assert restored(place, tmp_path / "again")["metrics.jsonl"] == old


def test_a_backup_of_a_newer_opsin_is_left_alone(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    mirror(run, place).sync()
    facts = json.loads((place / "backup.json").read_text())
    (place / "backup.json").write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(RunError, match="too new: format 2"):
        mirror(run, place).sync()


def test_a_name_outside_of_the_run_directory_is_damage(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    mirror(run, place).sync()
    mark = place / "checkpoints" / "step-00000010.json"
    facts = json.loads(mark.read_text())
    facts["files"]["../../../stolen"] = facts["files"]["state.pt"]
    mark.write_text(json.dumps(facts))
    with pytest.raises(RunError, match="every checkpoint is damaged: step 10"):
        restore(str(place), tmp_path / "again", Story())
    assert not (tmp_path / "stolen").exists()


def test_an_entry_is_size_and_hash() -> None:
    assert Entry(1, "a") != Entry(1, "b")


def test_a_run_directory_that_is_gone_removes_nothing(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    copying = mirror(run, place)
    copying.sync()
    before = content(place)
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError, match="the run directory is gone; nothing is removed from its backup"):
        copying.sync()
    assert content(place) == before


def test_what_a_rollback_set_aside_stays_until_the_step_written_anew_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place = write_run(tmp_path / "run", 20, 30), tmp_path / "backup"
    mirror(run, place).sync()
    (run / "checkpoints" / "step-00000030").rename(run / "checkpoints" / "unhealthy-step-00000030")
    write_checkpoint(run, 20, b"with a detour")
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", staticmethod(interrupting(Folder(place).put, "step-00000020/state.pt")))
        with pytest.raises(Interrupted):
            mirror(run, place).sync()
    assert marked_steps(Folder(place)) == [30]
    mirror(run, place).sync()
    assert marked_steps(Folder(place)) == [20]


def test_after_a_copy_to_another_place_the_first_one_is_pruned_as_before(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10, 20), tmp_path / "backup"
    mirror(run, place).sync()
    mirror(run, tmp_path / "other").sync()
    copying = mirror(run, place)
    copying.connect()
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    copying.sync()
    assert marked_steps(Folder(place)) == [20]


def test_a_file_that_cannot_be_read_is_no_fault_of_the_place(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10, 20), tmp_path / "backup"
    state = run / "checkpoints" / "step-00000020" / "state.pt"
    state.unlink()
    state.mkdir()
    assert mirror(run, place).sync() == ["the checkpoint of step 20 is damaged here; it was not sent"]
    assert marked_steps(Folder(place)) == [10]


@pytest.mark.parametrize("keep", ["same", "all"])
def test_the_whole_copy_of_what_is_damaged_here_stays_until_the_run_has_gone_on(tmp_path: Path, keep: str) -> None:
    run, place = write_run(tmp_path / "run", 10, 20), tmp_path / "backup"
    mirror(run, place, keep=keep).sync()
    (run / "checkpoints" / "step-00000020").rename(run / "checkpoints" / "damaged-step-00000020")
    copying = mirror(run, place, keep=keep)
    copying.sync()
    assert marked_steps(Folder(place)) == [10, 20]
    assert restore(str(place), tmp_path / "again", Quiet()).step == 20
    copying.stage(write_checkpoint(run, 15))
    copying.sync()
    assert marked_steps(Folder(place)) == [10, 15]


def test_a_checkpoint_that_came_damaged_stays_in_its_place_until_the_run_has_gone_on(tmp_path: Path) -> None:
    run, place, again = write_run(tmp_path / "run", 10, 20), tmp_path / "backup", tmp_path / "again"
    mirror(run, place).sync()
    state = place / "checkpoints" / "step-00000020" / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1] + b"!")
    assert restore(str(place), again, Story()).step == 10
    copying = mirror(again, place)
    copying.sync()
    state.write_bytes(whole)
    assert restore(str(place), tmp_path / "mended", Quiet()).step == 20
    copying.stage(write_checkpoint(again, 15))
    copying.sync()
    assert marked_steps(Folder(place)) == [10, 15]


def test_a_manifest_that_cannot_be_read_any_more_is_told_and_takes_no_copy_away(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    copying = mirror(run, place)
    copying.sync()
    (run / "checkpoints" / "step-00000010" / "manifest.json").write_bytes(bytes(20))
    assert copying.sync() == ["the checkpoint of step 10 is damaged here; its copy stays as it is"]
    assert not copying.missing()
    assert marked_steps(Folder(place)) == [10]


def test_what_a_killed_copy_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run", 10), tmp_path / "backup"
    mirror(run, place).sync()
    left = place / "checkpoints" / "step-00000020" / ".state.pt.sending"
    left.parent.mkdir()
    left.write_bytes(bytes(1000))
    with pytest.raises(RunError, match="another run"):
        mirror(write_run(tmp_path / "other", 10), place).connect()
    assert left.exists(), "of a run that may be sending it"
    mirror(run, place).sync()
    assert not left.parent.exists()
    assert content(place).keys() - {"backup.json", "checkpoints/step-00000010.json"} == content(run).keys()
