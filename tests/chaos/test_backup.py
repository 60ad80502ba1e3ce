"""A run whose machine is lost goes on from its backup, and ends in the same bytes as one that was left alone."""

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from opsin.commands.main import main
from opsin.commands.verify import digest
from opsin.reporting.journal import read_events, read_rows
from opsin.run.recipe import read
from opsin.run.session import resume_run, train, train_recipe
from opsin.storage.backup.catalog import marked_steps
from opsin.storage.backup.config import BackupConfig
from opsin.storage.backup.open import open_store
from opsin.storage.backup.restore import restore
from opsin.storage.backup.service import open_backup
from opsin.storage.directory import RunDirectory
from opsin.training.loop import Run
from tests.cli.commands import run_several
from tests.digits_run import BROKEN_UP, VIT
from tests.s3_server import KEY, SECRET, S3Server
from tests.story import Story
from tests.unit.storage.backup.small_run import Quiet, content, write_checkpoint, write_run

pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("torch_switches")]

STEPS = 24
SMALL = (*BROKEN_UP, *VIT, "precision=fp32", "log.every=1", f"limits.steps={STEPS}")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run that was left alone, without a backup."""
    return RunDirectory(training(tmp_path_factory.mktemp("straight") / "run").directory.path)


def training(out: Path, *overrides: str) -> Run:
    return train_recipe(read("quickstart", (*SMALL, *overrides)), out, name="quickstart", quiet=True)


def learned(run: RunDirectory) -> list[tuple[int, float]]:
    return [(row.step, row.values["train/loss"]) for row in read_rows(run.metrics)]


def lose(folder: Path) -> None:
    """The machine is gone with all that was on it."""
    shutil.rmtree(folder)


def test_a_run_goes_on_from_its_backup_bit_for_bit(s3: str, straight: RunDirectory, tmp_path: Path) -> None:
    training(tmp_path / "run", "limits.steps=13", f"backup.path={s3}")
    before = content(tmp_path / "run")
    lose(tmp_path / "run")
    assert restore(s3, tmp_path / "again", Quiet()).step == 13
    assert content(tmp_path / "again") == before
    run = RunDirectory(resume_run(tmp_path / "again", [f"limits.steps={STEPS}"], quiet=True).directory.path)
    assert digest(run) == digest(straight)
    assert learned(run) == learned(straight)
    # And the backup is that of the finished run.
    restore(s3, tmp_path / "end", Quiet())
    assert content(tmp_path / "end") == content(run.path)


def test_a_run_goes_on_from_an_earlier_step_of_its_backup(s3: str, straight: RunDirectory, tmp_path: Path) -> None:
    # What the run removes before it was sent would not be there.
    training(tmp_path / "run", f"backup.path={s3}", "backup.keep=all", "checkpoints.keep=9")
    assert restore(s3, tmp_path / "again", Quiet(), step=10).step == 10
    run = RunDirectory(resume_run(tmp_path / "again", [], quiet=True).directory.path)
    assert digest(run) == digest(straight)
    assert learned(run) == learned(straight)


def test_a_killed_machine_costs_what_was_not_copied_yet(
    s3: str, tmp_path: Path, opsin_env: Mapping[str, str], s3_server: S3Server
) -> None:
    long = ["epochs=200", "limits.steps=2000"]
    keys = [*SMALL, *long, f"backup.path={s3}"]
    command = [sys.executable, "-m", "opsin", "train", "quickstart", *keys, "--quiet", "--out", "run"]
    environment = {**opsin_env, **s3_server.environment}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 300
            while len(marked_steps(open_store(s3))) == 0:
                assert process.poll() is None, "it ended by itself"
                assert time.monotonic() < end
                time.sleep(0.01)
        finally:
            process.kill()
    shutil.rmtree(tmp_path / "run")
    restored = restore(s3, tmp_path / "again", Quiet())
    assert restored.step is not None
    steps = {step for step, _ in learned(RunDirectory(tmp_path / "again"))}
    assert set(range(1, restored.step + 1)) <= steps, "every row up to the checkpoint is there"
    end_there = f"limits.steps={restored.step + 3}"
    whole = RunDirectory(training(tmp_path / "whole", *long, end_there).directory.path)
    run = RunDirectory(resume_run(tmp_path / "again", [end_there], quiet=True).directory.path)
    assert digest(run) == digest(whole)
    assert learned(run) == learned(whole)


def test_training_goes_on_without_its_backup_and_catches_up(
    s3: str, straight: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        run = RunDirectory(training(tmp_path / "run", f"backup.path={s3}", "backup.wait=0").directory.path)
    assert digest(run) == digest(straight)
    told = [event.kind for event in read_events(run.events) if event.kind.startswith("backup")]
    assert told == ["backup_failed", "backup_incomplete"]
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == 2
    assert warnings[0].startswith(f"warning: backup: {s3}: HTTP error: error sending request; training goes on")
    assert warnings[1].endswith(f"opsin backup {run.path} finishes it")
    written = {**content(run.path), "ledger": b"".join(p.read_bytes() for p in run.path.rglob(".*") if p.is_file())}
    assert [name for name, data in written.items() if SECRET.encode() in data or KEY.encode() in data] == []
    assert marked_steps(open_store(s3)) == []
    assert main(["backup", str(run.path)]) == 0
    assert restore(s3, tmp_path / "again", Quiet()).step == STEPS
    assert content(tmp_path / "again") == content(run.path)


def test_a_server_that_never_answers_holds_up_no_end(s3: str, tmp_path: Path, s3_server: S3Server) -> None:
    folder, told = write_run(tmp_path / "run"), Story()
    config = BackupConfig(path=s3, wait=1)
    backup = open_backup(config, folder, resuming=False, teller=told)
    s3_server.pause()
    try:
        with backup:
            backup.take(write_checkpoint(folder, 10))
            end = time.monotonic()
        took_s = time.monotonic() - end
    finally:
        s3_server.go_on()
    assert [kind for kind, _ in told.events] == ["backup_incomplete"]
    assert took_s < 15, "one second, and some for a request on its way, which gives up after a minute at the earliest"


def test_the_commands_of_a_run_in_a_bucket(
    s3: str, straight: RunDirectory, tmp_path: Path, opsin_env: Mapping[str, str], s3_server: S3Server
) -> None:
    folder = tmp_path / ".cache" / "opsin" / "runs" / s3.replace("://", "/")
    train_there = ["train", "quickstart", *SMALL, "--out", s3]
    environment = {**opsin_env, **s3_server.environment}
    first, twice, wrong, secret = run_several(
        [
            train_there,
            [*train_there, f"backup.path={tmp_path}"],
            ["train", "quickstart", *SMALL, "--out", "here", "--local", "there"],
            ["train", "quickstart", *SMALL, "--out", s3.replace("//", f"//{KEY}:{SECRET}@")],
        ],
        tmp_path,
        environment,
    )
    assert first.status == 0, first.err
    assert first.out.startswith(f"run directory: {folder} (another one: --local FOLDER), copied to {s3}\n")
    assert digest(RunDirectory(folder)) == digest(straight)
    assert (twice.status, wrong.status, secret.status) == (2, 2, 2)
    assert "both name a backup of the run; give one" in twice.err
    assert "--local there goes with an address" in wrong.err
    assert "keys belong in the environment" in secret.err
    assert SECRET not in secret.err
    before = content(folder)
    lose(folder)
    lost, back, again, full, done = run_several(
        [
            train_there,
            ["resume", s3, "--quiet"],
            ["restore", s3, "copy"],
            ["restore", s3, "copy"],
            ["backup", "copy"],
        ],
        tmp_path,
        environment,
    )
    assert lost.status == 2
    assert f"{s3}: holds a run of which nothing is in {folder}; go on with it: opsin resume {s3}" in lost.err
    assert (back.status, again.status, done.status) == (0, 0, 0), (back.err, again.err, done.err)
    assert content(folder)["model.safetensors"] == before["model.safetensors"]
    assert again.out.startswith(f"copy: restored at step {STEPS} (")
    assert full.status == 2
    assert "copy: is not empty" in full.err
    assert done.out == f"copy: all is in {s3}\n"


def test_a_run_in_a_bucket_from_python(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = read("quickstart", [*SMALL, "limits.steps=1"])
    run = train(recipe, out=s3)
    assert run.directory.path == tmp_path / ".cache" / "opsin" / "runs" / s3.replace("://", "/")
    assert marked_steps(open_store(s3)) == [1]
