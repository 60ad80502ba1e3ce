"""The faults of benchmarks/chaos.py: whether one has struck is known, and no run outlives its case."""

import io
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import chaos_runs
from chaos import Outcome, Verdict, carry_out, report
from chaos_conditions import disk_may_fill, files_end_at, writes_are_counted, writes_fail
from chaos_faults import FAULTS
from chaos_runs import Case, Hung, Learned, Undisturbed
from opsin.storage.directory import RunDirectory

pytestmark = pytest.mark.chaos


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A case of which nothing has run."""
    return Case(tmp_path, random.Random(0), Undisturbed(Learned.of(RunDirectory(tmp_path / "run")), 0, 0))


@pytest.fixture
def own_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Conditions that begin here end with the test."""
    for owner, name in ((io, "open"), (os, "fsync"), (shutil, "disk_usage")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def write_and_sync(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(bytes(2000))
        os.fsync(file.fileno())


@pytest.mark.usefixtures("own_world")
@pytest.mark.parametrize(("first", "strikes"), [(2, True), (3, False)])
def test_failing_writes_strike_where_there_are_so_many(case: Case, first: int, strikes: bool) -> None:
    writes_fail(case.folder, first, 1)(case.strike)
    if strikes:
        with pytest.raises(OSError, match="Input/output error"):
            write_and_sync(case.folder / "file")
    else:
        write_and_sync(case.folder / "file")
    assert case.has_struck == strikes


@pytest.mark.usefixtures("own_world")
def test_writes_and_syncs_are_counted(case: Case) -> None:
    writes_are_counted(case.folder / "run", case.folder / "tally")(case.strike)
    (case.folder / "run").mkdir()
    write_and_sync(case.folder / "run" / "file")
    assert (case.folder / "tally").stat().st_size == 2


@pytest.mark.usefixtures("own_world")
@pytest.mark.parametrize(("size_bytes", "strikes"), [(1000, True), (2000, False)])
def test_an_end_of_files_strikes_where_one_gets_there(case: Case, size_bytes: int, strikes: bool) -> None:
    files_end_at(size_bytes)(case.strike)
    with (case.folder / "file").open("wb", buffering=0) as file:
        if file.write(bytes(2000)) < 2000:
            with pytest.raises(OSError, match="File too large"):
                file.write(bytes(1))
    assert case.has_struck == strikes


@pytest.mark.usefixtures("own_world")
@pytest.mark.parametrize(("needed_bytes", "strikes"), [(1, False), (1 << 62, True)])
def test_a_full_disk_strikes_who_looks_for_room(case: Case, needed_bytes: int, strikes: bool) -> None:
    disk_may_fill(case.folder, needed_bytes)(case.strike)
    write_and_sync(case.folder / "file")
    shutil.disk_usage(case.folder)
    assert case.has_struck == strikes


def test_a_fault_that_does_not_strike_is_drawn_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def rare(case: Case) -> int:
        if case.draw.random() < 0.3:
            case.strike()
        return 0

    monkeypatch.setitem(FAULTS, "rare", rare)
    runs = [carry_out("rare", seed, stride=20, undisturbed=case.undisturbed, folder=case.folder) for seed in range(20)]
    seeds = [outcome.seed for outcomes in runs for outcome in outcomes]
    assert len(seeds) == len(set(seeds)) > 20
    for seed, outcomes in enumerate(runs):
        assert [outcome.seed for outcome in outcomes] == [seed + 20 * number for number in range(len(outcomes))]
        assert {outcome.verdict for outcome in outcomes[:-1]} <= {"unstruck"}
        assert outcomes[-1].verdict == "same" or len(outcomes) == 5


def test_what_has_not_struck_is_no_proof(capsys: pytest.CaptureFixture[str]) -> None:
    def outcomes(*verdicts: Verdict) -> list[Outcome]:
        said = "warning: first\nopsin: no room\nlast"
        return [Outcome("sigterm", seed, verdict, "story", said) for seed, verdict in enumerate(verdicts)]

    assert report(outcomes("unstruck", "same", "refused"), 2)
    told = capsys.readouterr().out.splitlines()
    assert told[-3:] == ["  sigterm: opsin: no room", "", "lost: 0 of 2 disturbed runs"]
    assert not report(outcomes("unstruck", "same"), 2)
    assert "1 of 2 faults did not strike with any of 5 seeds" in capsys.readouterr().out
    assert not report(outcomes("same", "lost", "lost"), 3)
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "lost: 2 of 3 disturbed runs"
    assert told[2].split() == ["sigterm", "3", "1", "0", "2", "0"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child sleeps and does nothing else
def test_a_training_that_hangs_is_lost_and_ends_with_its_case(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos_runs, "_PATIENCE_S", 0.1)
    with case.cleanup:
        process = case.opsin([], lambda strike: time.sleep(600))
        with pytest.raises(Hung):
            case.reach(process)
    assert process.poll() == -signal.SIGKILL
    assert not case.has_struck
