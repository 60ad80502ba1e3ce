import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsin.errors import ConfigError, RunError
from opsin.storage.backup import store
from opsin.storage.backup.open import Folder, open_store
from opsin.storage.backup.restore import restore
from opsin.storage.backup.store import StoreError, read_bytes
from tests.conftest import RunOnSmallDisk
from tests.s3_server import S3Server
from tests.story import Story
from tests.unit.storage.backup.small_run import Interrupted, Quiet, content, mirror, write_checkpoint, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is copied to the folder `backup` beside it."""
    run = write_run(tmp_path / "run", 10, 20, 30)
    (run / "model.safetensors").write_bytes(b"weights of step 30")
    mirror(run, tmp_path / "backup").sync()
    return run


def flip(path: Path) -> None:
    """One bit of the file is another."""
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:] if len(data) > 100 else data[:-1] + b"~")


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(run: Path, tmp_path: Path) -> None:
    flip(tmp_path / "backup" / "checkpoints" / "step-00000030" / "state.pt")
    told = Story()
    assert restore(str(tmp_path / "backup"), tmp_path / "again", told).step == 20
    (fault,) = told.notices
    assert fault.endswith("step-00000030/state.pt is damaged; the checkpoint of step 30 is left out")
    assert steps(tmp_path / "again") == ["step-00000010", "step-00000020"]
    # The weights of the end are no weights of step 20.
    assert not (tmp_path / "again" / "model.safetensors").exists()


@pytest.mark.parametrize("how", ["missing file", "torn mark", "mark of another step"])
def test_any_damage_to_a_checkpoint_is_found(run: Path, tmp_path: Path, how: str) -> None:
    checkpoints = tmp_path / "backup" / "checkpoints"
    mark = checkpoints / "step-00000030.json"
    if how == "missing file":
        (checkpoints / "step-00000030" / "manifest.json").unlink()
    elif how == "torn mark":
        mark.write_bytes(mark.read_bytes()[:-20])
    else:
        shutil.copyfile(checkpoints / "step-00000010.json", mark)
    assert restore(str(tmp_path / "backup"), tmp_path / "again", Story()).step == 20


def test_a_damaged_recipe_is_never_trained(run: Path, tmp_path: Path) -> None:
    flip(tmp_path / "backup" / "recipe.yaml")
    with pytest.raises(RunError, match=r"recipe.yaml is damaged; without its recipe the run cannot go on"):
        restore(str(tmp_path / "backup"), tmp_path / "again", Story())
    assert not (tmp_path / "again").exists()


def test_a_damaged_log_comes_with_a_warning_a_damaged_picture_stays_away(run: Path, tmp_path: Path) -> None:
    flip(tmp_path / "backup" / "metrics.jsonl")
    flip(tmp_path / "backup" / "plots" / "loss.png")
    told = Story()
    restore(str(tmp_path / "backup"), tmp_path / "again", told)
    assert [text.removeprefix(f"{tmp_path}/backup: ") for text in told.notices] == [
        "metrics.jsonl is damaged; it is taken as it is",
        "plots/loss.png is damaged; it is left out",
    ]


def test_a_damaged_index_costs_the_proof_and_no_file(run: Path, tmp_path: Path) -> None:
    flip(tmp_path / "backup" / "backup.json")
    (tmp_path / "backup" / "backup.json").write_text("{")
    told = Story()
    restore(str(tmp_path / "backup"), tmp_path / "again", told)
    assert content(tmp_path / "again") == content(run)
    assert "the files of the run are taken as they are" in told.notices[0]
    mirror(tmp_path / "again", tmp_path / "backup").sync()


def test_a_step_is_restored_with_those_before_it_or_alone(run: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "backup")
    assert restore(place, tmp_path / "some", Story(), step=20).step == 20
    assert steps(tmp_path / "some") == ["step-00000010", "step-00000020"]
    assert restore(place, tmp_path / "one", Story(), only=True).step == 30
    assert steps(tmp_path / "one") == ["step-00000030"]
    with pytest.raises(RunError, match="has no whole checkpoint of step 25; there are: 10, 20, 30"):
        restore(place, tmp_path / "none", Story(), step=25)
    flip(tmp_path / "backup" / "checkpoints" / "step-00000020" / "state.pt")
    with pytest.raises(RunError, match="the checkpoint of step 20 is damaged; take another --step"):
        restore(place, tmp_path / "none", Story(), step=20)


def test_an_interrupted_restore_goes_on_where_it_was(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    fetch = Folder.fetch

    def breaking(self: Folder, name: str, *, start: int = 0) -> Iterator[bytes]:
        fetched.append(name)
        if name.endswith("step-00000010/state.pt") and fetched.count(name) == 1:
            raise Interrupted
        return fetch(self, name, start=start)

    monkeypatch.setattr(Folder, "fetch", breaking)
    with pytest.raises(Interrupted):
        restore(str(tmp_path / "backup"), tmp_path / "again", Story())
    assert not (tmp_path / "again").exists(), "half a run directory has not its name"
    restore(str(tmp_path / "backup"), tmp_path / "again", Story())
    assert content(tmp_path / "again") == content(run)
    states = [name for name in fetched if name.endswith("state.pt")]
    assert sorted(states) == sorted(f"checkpoints/step-000000{step}/state.pt" for step in (10, 10, 20, 30))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def breaking_off(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[int]:
    """Make `state.pt` of step 20 break off after each 500 bytes, so many times; the bytes at which it was begun."""
    fetch = Folder.fetch
    starts: list[int] = []

    def breaking(self: Folder, name: str, *, start: int = 0) -> Iterator[bytes]:
        if not name.endswith("step-00000020/state.pt"):
            yield from fetch(self, name, start=start)
            return
        starts.append(start)
        data = b"".join(fetch(self, name, start=start))
        yield data[:500]
        if len(starts) <= times:
            raise error
        yield data[500:]

    monkeypatch.setattr(Folder, "fetch", breaking)
    return starts


def test_a_file_that_breaks_off_goes_on_where_it_was(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_FIRST_PAUSE_S", 0.001)
    told = Story()
    starts = breaking_off(monkeypatch, StoreError("the line is bad"), times=6)
    restore(str(tmp_path / "backup"), tmp_path / "again", told)
    assert content(tmp_path / "again") == content(run)
    assert starts == [500 * at for at in range(7)]
    assert told.notices == ["the line is bad; trying again"] * 6, "more often than it would be asked if nothing came"


def test_the_next_restore_goes_on_in_the_middle_of_a_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = breaking_off(monkeypatch, Interrupted(), times=1)
    with pytest.raises(Interrupted):
        restore(str(tmp_path / "backup"), tmp_path / "again", Quiet())
    restore(str(tmp_path / "backup"), tmp_path / "again", Quiet())
    assert content(tmp_path / "again") == content(run)
    assert starts == [0, 500]


def test_what_was_left_of_another_content_is_fetched_anew(run: Path, tmp_path: Path) -> None:
    left = tmp_path / ".again.restoring" / "checkpoints" / "step-00000020" / ".state.pt.fetching"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of the state before a rollback")
    restore(str(tmp_path / "backup"), tmp_path / "again", Quiet())
    assert content(tmp_path / "again") == content(run)


def test_a_file_is_damaged_when_it_has_come_so_twice(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Folder.fetch
    fetched: list[str] = []

    def flipping(self: Folder, name: str, *, start: int = 0) -> Iterator[bytes]:
        fetched.append(name)
        data = b"".join(fetch(self, name, start=start))
        is_bad = name.endswith("state.pt") and (fetched.count(name) == 1 or "step-00000020" in name)
        yield b"!" + data[1:] if is_bad else data

    monkeypatch.setattr(Folder, "fetch", flipping)
    told = Story()
    assert restore(str(tmp_path / "backup"), tmp_path / "again", told).step == 30
    assert steps(tmp_path / "again") == ["step-00000010", "step-00000030"]
    assert len(told.notices) == 1


def test_what_an_interrupted_restore_of_another_state_left_is_not_taken_along(run: Path, tmp_path: Path) -> None:
    left = tmp_path / ".again.restoring" / "checkpoints" / "step-00000040"
    left.mkdir(parents=True)
    (left / "state.pt").write_bytes(b"of another run")
    restore(str(tmp_path / "backup"), tmp_path / "again", Story())
    assert content(tmp_path / "again") == content(run)


def test_a_folder_that_is_not_empty_is_left_alone(run: Path, tmp_path: Path) -> None:
    before = content(run)
    with pytest.raises(RunError, match=r"run: is not empty; restore into a new folder"):
        restore(str(tmp_path / "backup"), run, Story())
    assert content(run) == before
    (tmp_path / "empty").mkdir()
    assert restore(str(tmp_path / "backup"), tmp_path / "empty", Story()).step == 30


def test_a_second_restore_into_the_same_folder_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = Folder.fetch
    said: list[str] = []

    def meddling(self: Folder, name: str, *, start: int = 0) -> Iterator[bytes]:
        if name.endswith("step-00000020/state.pt"):  # the newest checkpoint is in the hidden folder by now
            with pytest.raises(RunError) as caught:
                restore(str(tmp_path / "backup"), tmp_path / "again", Quiet())
            said.append(str(caught.value))
        return fetch(self, name, start=start)

    monkeypatch.setattr(Folder, "fetch", meddling)
    assert restore(str(tmp_path / "backup"), tmp_path / "again", Quiet()).step == 30
    assert content(tmp_path / "again") == content(run)
    assert not list((tmp_path / "again").glob(".lock"))
    (text,) = said
    assert text.startswith(f"{tmp_path}/again: process {os.getpid()} on ")
    assert text.endswith(" is restoring into it; wait for it, or choose another DIR")


def test_a_restore_that_another_one_was_faster_than_takes_nothing_away(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, asked = Folder.names, []

    def meddling(self: Folder, folder: str = "") -> list[str]:
        asked.append(folder)
        if len(asked) == 1:
            restore(str(tmp_path / "backup"), tmp_path / "again", Quiet())
        return names(self, folder)

    monkeypatch.setattr(Folder, "names", meddling)
    with pytest.raises(RunError, match="again: is not empty"):
        restore(str(tmp_path / "backup"), tmp_path / "again", Quiet())
    assert content(tmp_path / "again") == content(run)
    assert not list(tmp_path.glob(".again*"))


def test_everything_is_synced_before_it_gets_its_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[str, bool] = {}
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = (tmp_path / "again").exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    restore(str(tmp_path / "backup"), tmp_path / "again", Quiet())
    hidden = tmp_path / ".again.restoring"
    for path in (tmp_path / "again", *(tmp_path / "again").rglob("*")):
        assert synced[str(hidden / path.relative_to(tmp_path / "again"))] is False, path
    assert synced[str(tmp_path)] is True


def test_a_link_to_an_empty_folder_leads_to_the_restored_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "again").symlink_to(tmp_path / "disk" / "empty")
    restore(str(tmp_path / "backup"), tmp_path / "again", Quiet())
    assert (tmp_path / "again").is_symlink()
    assert content(tmp_path / "disk" / "empty") == content(run)


def test_a_mount_point_is_refused_before_anything_is_fetched(run_on_small_disk: RunOnSmallDisk) -> None:
    program = """
        import sys
        from pathlib import Path
        from opsin.storage.backup.restore import restore
        from opsin.errors import RunError
        from opsin.storage.teller import Silence
        from tests.unit.storage.backup.small_run import mirror, write_run
        folder = Path(sys.argv[1])
        mirror(write_run(Path(sys.argv[2]) / "run", 10), Path(sys.argv[2]) / "backup").sync()
        for name in (folder, folder / "run"):
            try:
                print(restore(sys.argv[2] + "/backup", name, Silence()).step)
            except RunError as error:
                print(error)
        print(*(path.name for path in folder.parent.glob(".*.restoring")))
    """
    with tempfile.TemporaryDirectory() as beside:
        refused, step, left = run_on_small_disk(textwrap.dedent(program), beside, size="1m")
    place, _, rule = refused.partition(": ")
    way_out = f"restore into a new folder in it: {place}/run"
    assert rule == f"is a mount point, and a run directory gets its name when it is whole; {way_out}"
    assert (step, left) == ("10", "")


def test_what_holds_no_backup_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no backup of a run"):
        restore(str(tmp_path / "nothing"), tmp_path / "again", Story())
    with pytest.raises(ConfigError, match=r"command line: .*must begin with"):
        restore("http://runs/one", tmp_path / "again", Story())
    assert not (tmp_path / "again").exists()


def test_a_run_comes_back_from_a_bucket_past_a_damaged_object(s3_server: S3Server, s3: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    write_checkpoint(run, 20, bytes(range(256)) * (9 * 2**20 // 256))
    mirror(run, s3).sync()
    restore(s3, tmp_path / "whole", Story())
    assert content(tmp_path / "whole") == content(run)
    place, name = open_store(s3), "checkpoints/step-00000020/state.pt"
    data = bytearray(read_bytes(place, name) or b"")
    data[2**20] ^= 1
    place.put(name, iter([bytes(data)]), size=len(data), sha256="of what it was")
    assert restore(s3, tmp_path / "again", Story()).step == 10


def test_a_backup_in_use_is_only_read(run: Path, tmp_path: Path) -> None:
    before = content(tmp_path / "backup")
    restore(str(tmp_path / "backup"), tmp_path / "again", Story())
    assert content(tmp_path / "backup") == before


def test_an_address_with_a_slash_at_its_end_is_the_same_place(s3_server: S3Server, s3: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10, 20)
    mirror(run, s3).sync()
    restore(f"{s3}/", tmp_path / "again", Story(), step=10)
    # The ledger knows that the later checkpoint is this run's own.
    mirror(tmp_path / "again", s3).sync()
