import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opsin.commands.main import main
from opsin.errors import ConfigError, RunError
from opsin.storage.backup.catalog import marked_steps
from opsin.storage.backup.config import BackupConfig
from opsin.storage.backup.mirror import Mirror
from opsin.storage.backup.open import Folder, open_store
from opsin.storage.backup.restore import restore
from opsin.storage.backup.service import BackgroundBackup, Backup, backup_of, finish_backup, open_backup
from opsin.storage.backup.store import StoreError
from opsin.storage.files import remove_whole
from tests.s3_server import KEY, SECRET, S3Server
from tests.story import Story
from tests.unit.storage.backup.small_run import Quiet, content, mirror, write_checkpoint, write_run


class Told(Story):
    """The reports of a backup."""

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


def background(run: Path, place: Path | str, told: Told, **keys: object) -> BackgroundBackup:
    return BackgroundBackup(BackupConfig.model_validate({"path": str(place), **keys}), run, told)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_is_copied_while_it_goes_on_and_whole_at_its_end(tmp_path: Path) -> None:
    run, place, told = write_run(tmp_path / "run"), tmp_path / "backup", Told()
    with background(run, place, told) as backup:
        for step in (10, 20, 30):
            backup.take(write_checkpoint(run, step))
            if step > 10:
                remove_whole(run / "checkpoints" / f"step-{step - 10:08d}")
        wait_for(lambda: marked_steps(Folder(place)) == [30])
        (run / "model.safetensors").write_bytes(b"weights")
    assert told.kinds == []
    restore(str(place), tmp_path / "again", Quiet())
    assert content(tmp_path / "again") == content(run)


def test_logs_are_copied_every_few_minutes(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "run"), tmp_path / "backup"
    with background(run, place, Told(), minutes=0.001):
        wait_for(lambda: (place / "metrics.jsonl").exists())
        (run / "metrics.jsonl").write_text("more\n")
        wait_for(lambda: (place / "metrics.jsonl").read_text() == "more\n")


def test_a_place_out_of_reach_is_told_once_and_caught_up_with(tmp_path: Path) -> None:
    run, disk, told = write_run(tmp_path / "run"), tmp_path / "disk", Told()
    with background(run, disk / "backup", told) as backup:
        for step in (10, 20):
            backup.take(write_checkpoint(run, step))
            wait_for(lambda: told.events)
        disk.mkdir()
        wait_for(lambda: "backup_recovered" in told.kinds)
    assert told.kinds == ["backup_failed", "backup_recovered"]
    assert marked_steps(Folder(disk / "backup")) == [10, 20]


def test_the_end_waits_a_bounded_time_and_says_what_is_missing(tmp_path: Path) -> None:
    run, told = write_run(tmp_path / "run", 10), Told()
    with background(run, tmp_path / "disk" / "backup", told, wait=0.5):
        pass
    assert told.kinds == ["backup_failed", "backup_incomplete"]
    text = told.warnings[-1]
    assert (
        "not copied yet: the checkpoint of step 10; events.jsonl, metrics.jsonl, plots/loss.png and 1 more files"
        in text
    )
    assert text.endswith(f"opsin backup {run} finishes it")
    (tmp_path / "disk").mkdir()
    config = BackupConfig(path=str(tmp_path / "disk" / "backup"))
    finish_backup(config, run, Quiet())
    restore(config.path, tmp_path / "again", Quiet())
    assert content(tmp_path / "again") == content(run)


def test_a_slow_line_is_let_go_of_at_the_end(tmp_path: Path) -> None:
    run, told = write_run(tmp_path / "run"), Told()
    started = time.monotonic()
    with background(run, tmp_path / "backup", told, wait=0.2, max_mib_per_s=0.001) as backup:
        backup.take(write_checkpoint(run, 10, bytes(3 * 2**20)))
    assert time.monotonic() - started < 1000, "3 MiB would take 3000 seconds"
    assert told.kinds == ["backup_incomplete"]
    assert marked_steps(Folder(tmp_path / "backup")) == []


def test_taking_a_checkpoint_never_waits_for_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, release = write_run(tmp_path / "run"), threading.Event()
    names = Folder.names

    def stuck(self: Folder, folder: str = "") -> list[str]:
        release.wait(600)
        return names(self, folder)

    monkeypatch.setattr(Folder, "names", stuck)
    with background(run, tmp_path / "backup", Told()) as backup:
        for step in (10, 20):
            backup.take(write_checkpoint(run, step))
        assert not (tmp_path / "backup").exists()
        release.set()
    assert marked_steps(Folder(tmp_path / "backup")) == [10, 20]


def test_another_run_is_refused_before_training(tmp_path: Path) -> None:
    place = tmp_path / "backup"
    mirror(write_run(tmp_path / "other", 10), place).sync()
    config = BackupConfig(path=str(place))
    with pytest.raises(RunError, match="another run"):
        open_backup(config, write_run(tmp_path / "run"), resuming=False, teller=Told())


def test_no_backup_is_asked_for(tmp_path: Path) -> None:
    with open_backup(None, tmp_path, resuming=False, teller=Told()) as backup:
        assert type(backup) is Backup
        backup.take(tmp_path)


def test_the_recipe_of_a_run_says_where_its_backup_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert backup_of(run, None) is None
    given = backup_of(run, "s3://runs/one")
    assert given is not None
    assert given.path == "s3://runs/one"
    (run / "recipe.yaml").write_text("seed: 0\nbackup: {path: /mnt/runs, leave_out: [plots/*]}\n")
    assert backup_of(run, None) == BackupConfig(path="/mnt/runs", leave_out=("plots/*",))
    with pytest.raises(ConfigError, match=r"backup.path: 'ftp://\*\*\*@runs' holds credentials") as caught:
        backup_of(run, "ftp://me:hunter2hunter2@runs")
    assert "hunter2" not in str(caught.value)


def test_a_server_killed_in_the_middle_of_an_upload_gets_all_once_it_is_back(
    s3_server: S3Server, s3: str, tmp_path: Path
) -> None:
    run, told = write_run(tmp_path / "run"), Told()
    large = bytes(range(256)) * (40 * 2**20 // 256)
    with background(run, s3, told, max_mib_per_s=40) as backup:
        backup.take(write_checkpoint(run, 10))
        wait_for(lambda: marked_steps(open_store(s3)) == [10])
        backup.take(write_checkpoint(run, 20, large))
        time.sleep(0.3)
        s3_server.kill()
        wait_for(lambda: told.events)
        backup.take(write_checkpoint(run, 30))
        s3_server.start()  # and it remembers nothing
        wait_for(lambda: "backup_recovered" in told.kinds)
    assert told.kinds == ["backup_failed", "backup_recovered"]
    assert not any(secret in text for text in told.warnings + told.notices for secret in (KEY, SECRET))
    assert marked_steps(open_store(s3)) == [10, 20, 30]
    restore(s3, tmp_path / "again", Quiet())
    assert content(tmp_path / "again") == content(run)


def test_a_bucket_that_is_missing_ends_a_new_run_before_it_begins(s3_server: S3Server, s3: str, tmp_path: Path) -> None:
    run, told = write_run(tmp_path / "run"), Told()
    config = BackupConfig(path="s3://nowhere/run", wait=0)
    with pytest.raises(ConfigError, match=r"s3://nowhere/run: there is no such bucket; mend it, or .*backup=null"):
        open_backup(config, run, resuming=False, teller=told)
    with open_backup(config, run, resuming=True, teller=told):
        pass
    assert told.kinds == ["backup_failed", "backup_incomplete"]


def flip(path: Path) -> None:
    """The file is as long as it was, and another."""
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def test_a_damaged_checkpoint_does_not_hold_up_the_end(tmp_path: Path) -> None:
    run, place, told = write_run(tmp_path / "run", 10, 20), tmp_path / "backup", Told()
    flip(run / "checkpoints" / "step-00000020" / "state.pt")
    started = time.monotonic()
    with background(run, place, told, wait=3600):
        pass
    assert time.monotonic() - started < 3600
    assert [kind for kind in told.kinds if kind != "backup_waiting"] == ["backup_damaged", "backup_incomplete"]
    assert marked_steps(Folder(place)) == [10]


@pytest.mark.parametrize("sent", [True, False])
def test_a_damaged_manifest_ends_with_few_passes_and_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    run, place, told = write_run(tmp_path / "run", 10), tmp_path / "backup", Told()
    passes: list[None] = []
    if sent:
        mirror(run, place).sync()
    (run / "checkpoints" / "step-00000010" / "manifest.json").write_bytes(bytes(20))
    sync = Mirror.sync

    def counting(self: Mirror) -> list[str]:
        passes.append(None)
        return sync(self)

    monkeypatch.setattr(Mirror, "sync", counting)
    with background(run, place, told, wait=2):
        pass
    assert len(passes) <= 10
    fate = "its copy stays as it is" if sent else "it was not sent"
    text = f"backup: the checkpoint of step 10 is damaged here; {fate}"
    assert ("backup_damaged", {"warning": text}) in told.events
    assert marked_steps(Folder(place)) == [10] * sent


def test_what_fails_after_the_end_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, told, release = write_run(tmp_path / "run", 10), Told(), threading.Event()

    def stuck(self: Folder, folder: str = "") -> list[str]:
        release.wait(600)
        raise StoreError("the server is gone")

    monkeypatch.setattr(Folder, "names", stuck)
    monkeypatch.setattr("opsin.storage.backup.service._GRACE_S", 0.1)
    with background(run, tmp_path / "backup", told, wait=0.1) as backup:
        pass
    before = list(told.events)
    release.set()
    backup._thread.join()
    assert told.events == before


def test_the_command_tells_of_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, place = write_run(tmp_path / "run", 10, 20), tmp_path / "backup"
    flip(run / "checkpoints" / "step-00000020" / "state.pt")
    assert main(["backup", str(run), str(place)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"run: all but 1 checkpoint went to {place}" in shown.err
    assert marked_steps(Folder(place)) == [10]


def test_a_log_that_cannot_be_read_ends_the_command_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    put = Folder.put

    def losing(self: Folder, name: str, chunks: Iterator[bytes], *, size: int, sha256: str) -> None:
        if name == "metrics.jsonl":
            (run / ".backup" / "files" / name).unlink()
        put(self, name, chunks, size=size, sha256=sha256)

    monkeypatch.setattr(Folder, "put", losing)
    with pytest.raises(RunError, match=r"metrics.jsonl: cannot be read: .*; what was sent stays"):
        finish_backup(BackupConfig(path=str(tmp_path / "backup")), run, Quiet())
