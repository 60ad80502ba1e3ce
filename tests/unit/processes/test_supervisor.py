"""What a supervisor does when its child ends. The children here are small programs that leave a real trail."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from opsin.processes.excluded import ExcludedImage, read_excluded, write_excluded
from opsin.processes.supervisor import Supervision, supervise
from opsin.reporting.journal import read_events

CHILD = """
import json, os, signal, sys, time
from array import array
from pathlib import Path
from opsin.processes.trail import Trail

out = Path(sys.argv[1])
if "--fresh" in sys.argv and (out.parent / "moves").exists():
    out.rename(out.with_name("run.before-1"))
out.mkdir(exist_ok=True)
(out / "recipe.yaml").touch()
starts = out / "starts.jsonl"
with starts.open("a") as file:
    file.write(json.dumps({"arguments": sys.argv[2:], "time": time.time()}) + "\\n")
life = json.loads((out.parent / "lives.json").read_text())[len(starts.read_text().splitlines()) - 1]
trail = Trail.from_environment()
if "checkpoint" in life:
    (out / "checkpoints" / f"step-{life['checkpoint']:08d}").mkdir(parents=True, exist_ok=True)
if "step" in life:
    trail.at_step(life["step"], array("q", life.get("ids", [])).tobytes())
if "reading" in life:
    trail.begin_reading(*life["reading"])
if "verdict" in life:
    trail.verdict(life["verdict"])
print(life.get("stderr", ""), file=sys.stderr)
if "listen" in life:
    signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(3))
    (out / "listens").touch()
    time.sleep(20)
if life["end"] < 0:
    os.kill(os.getpid(), -life["end"])
sys.exit(life["end"])
"""


def run(folder: Path, lives: Sequence[dict[str, Any]], *, fresh: bool = False, **settings: Any) -> int:
    """Supervise a child that lives so, one life after another."""
    (folder / "lives.json").write_text(json.dumps(lives))
    (folder / "child.py").write_text(CHILD)
    program = (sys.executable, str(folder / "child.py"))
    quick = {"restarts": 5, "first_wait_s": 0.01, "longest_wait_s": 0.02, "program": program, **settings}
    return supervise([str(folder / "run")], folder / "run", Supervision(**quick), fresh=fresh, quiet=True)


def starts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "starts.jsonl").read_text().splitlines()]


def crashes(folder: Path) -> list[dict[str, Any]]:
    return [dict(e.facts, step=e.step) for e in read_events(folder / "run" / "events.jsonl") if e.kind == "crash"]


@pytest.mark.parametrize("status", [0, 2, 3])
def test_an_end_that_is_no_crash_is_final(tmp_path: Path, status: int) -> None:
    assert run(tmp_path, [{"end": status}]) == status
    assert len(starts(tmp_path)) == 1
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_crash_is_followed_by_a_restart_and_stands_in_the_events(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lives = [{"end": 4, "checkpoint": 40, "step": 41, "ids": [3, 7], "stderr": "opsin: disk of the data is gone"}]
    assert run(tmp_path, [*lives, {"end": 0}]) == 0
    (crash,) = crashes(tmp_path)
    assert (crash["step"], crash["update"], crash["images"], crash["restarts"]) == (40, 42, [3, 7], True)
    assert crash["cause"] == "disk of the data is gone"
    shown = capfd.readouterr()
    assert "training crashed in or right after update 42: disk of the data is gone" in shown.out
    assert "goes on from the checkpoint of step 40 in" in shown.out
    assert "disk of the data is gone" in shown.err  # what the child says is seen at once
    assert "crash" in (tmp_path / "run" / "log.txt").read_text()


def test_restarts_are_counted(tmp_path: Path) -> None:
    assert run(tmp_path, [{"end": 4}] * 9, restarts=2) == 4
    assert len(starts(tmp_path)) == 3
    assert [crash["restarts"] for crash in crashes(tmp_path)] == [True, True, False]


def test_a_verdict_on_the_training_is_not_tried_again(tmp_path: Path) -> None:
    assert run(tmp_path, [{"end": 4, "verdict": "loss nan", "stderr": "opsin: loss nan"}]) == 4
    assert "a restart does not change" in crashes(tmp_path)[0]["message"]


def test_a_crash_at_one_place_is_told_from_passing_ones(tmp_path: Path) -> None:
    at = [7, 9, 9, 9, 12]
    assert run(tmp_path, [*({"end": -11, "step": step, "ids": [step]} for step in at), {"end": 0}]) == 0
    found = crashes(tmp_path)
    assert [crash["repeats"] for crash in found] == [1, 1, 2, 3, 1]
    assert "3rd crash of this kind in a row" in found[3]["message"]
    assert "image 9" in found[3]["message"]
    assert "segmentation fault" in found[0]["cause"]


def test_images_of_a_crash_that_repeats_are_put_aside(tmp_path: Path) -> None:
    life = {"end": -6, "step": 9, "ids": [4, 5]}
    assert run(tmp_path, [life, life, {"end": 0}], quarantine_after=2) == 0
    aside = read_excluded(tmp_path / "run" / "put_aside.json")
    assert [item.index for item in aside] == [4, 5]
    assert "crashed with it 2 times" in aside[0].reason
    kinds = [event.kind for event in read_events(tmp_path / "run" / "events.jsonl")]
    assert kinds == ["crash", "crash", "put_aside"]


def test_the_image_that_was_being_read_is_named_whatever_the_step(tmp_path: Path) -> None:
    lives = [{"end": -11, "step": step, "ids": [1, 2], "reading": [17, "a/17.png"]} for step in (8, 5)]
    assert run(tmp_path, [*lives, {"end": 0}], quarantine_after=2) == 0
    assert [item.index for item in read_excluded(tmp_path / "run" / "put_aside.json")] == [17]
    assert "while reading image 17 (a/17.png)" in crashes(tmp_path)[1]["message"]


def test_a_crash_without_its_images_ends_the_search(tmp_path: Path) -> None:
    assert run(tmp_path, [{"end": -6, "step": 9, "ids": [4, 5]}] * 9, quarantine_after=2, restarts=8) == 4
    assert len(starts(tmp_path)) == 4
    assert "they are not the cause" in crashes(tmp_path)[-1]["message"]


def test_the_wait_grows_until_a_checkpoint_is_written(tmp_path: Path) -> None:
    saved = [None, None, None, 5, None]
    lives = [{"end": 4, **({} if step is None else {"checkpoint": step})} for step in saved]
    assert run(tmp_path, [*lives, {"end": 0}], first_wait_s=0.05, longest_wait_s=0.2) == 0
    waits = [crash["message"] for crash in crashes(tmp_path)]
    assert [text.split(" in ")[-1].split(" s ")[0] for text in waits] == ["0.1", "0.2", "0.2", "0.1", "0.1"]


def test_fresh_is_said_until_the_earlier_run_is_out_of_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    (tmp_path / "run" / "starts.jsonl").touch()
    # The child does not move anything aside here: it is told again. A new folder needs no --fresh.
    assert run(tmp_path, [{"end": 4}, {"end": 0}], fresh=True) == 0
    assert [start["arguments"] for start in starts(tmp_path)] == [["--fresh"], ["--fresh"]]
    (tmp_path / "run").rename(tmp_path / "earlier")
    assert run(tmp_path, [{"end": 4}, {"end": 0}], fresh=True) == 0
    assert [start["arguments"] for start in starts(tmp_path)] == [[], []]


def test_a_restart_goes_on_with_the_fresh_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("earlier")
    (tmp_path / "moves").touch()
    lives = [{"end": 4, "checkpoint": 7}, {"end": -9}, {"end": 0}]
    assert run(tmp_path, lives, fresh=True) == 0
    assert [start["arguments"] for start in starts(tmp_path)] == [["--fresh"], [], []]
    assert (tmp_path / "run" / "checkpoints" / "step-00000007").is_dir(), "what the fresh run has saved is there"
    assert (tmp_path / "run.before-1" / "recipe.yaml").read_text() == "earlier"
    assert not (tmp_path / "run.before-2").exists()


@contextmanager
def signal_as_soon_as(path: Path, number: signal.Signals) -> Iterator[None]:
    """Sends a signal to this process when there is a file of this name."""

    def send() -> None:
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    yield
    sender.join()


def test_a_signal_is_handed_on_and_the_status_kept(tmp_path: Path) -> None:
    with signal_as_soon_as(tmp_path / "run" / "listens", signal.SIGUSR1):
        assert run(tmp_path, [{"listen": True, "end": 0}]) == 3


def test_a_signal_ends_the_wait(tmp_path: Path) -> None:
    began = time.monotonic()
    with signal_as_soon_as(tmp_path / "run" / "events.jsonl", signal.SIGTERM):
        assert run(tmp_path, [{"end": 4}], first_wait_s=60, longest_wait_s=60) == 3
    assert time.monotonic() - began < 30


def test_a_run_that_another_process_writes_gets_no_event(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from opsin.storage.directory import RunDirectory

    (tmp_path / "run").mkdir()
    with RunDirectory.locked(tmp_path / "run"):
        assert run(tmp_path, [{"end": 4}, {"end": 0}]) == 0
    assert not crashes(tmp_path)
    assert "is writing this run" in capfd.readouterr().out


def test_images_are_put_aside_by_the_one_that_has_the_run_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from opsin.storage.directory import RunDirectory

    (tmp_path / "run").mkdir()
    life = {"end": -6, "step": 9, "ids": [4, 5]}
    with RunDirectory.locked(tmp_path / "run"):
        assert run(tmp_path, [life, life, {"end": 2}], quarantine_after=2) == 2
    assert not (tmp_path / "run" / "put_aside.json").exists()
    told = capfd.readouterr().out
    assert "4, 5 cannot be left out (put_aside.json: the run cannot be locked), which is tried again" in told
    assert "from now on" not in told


def test_images_that_could_not_be_put_aside_are_so_after_the_next_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True]

    def write(path: Path, images: Sequence[ExcludedImage]) -> None:
        if full and full.pop():
            raise OSError(errno.ENOSPC, "No space left on device")
        write_excluded(path, images)

    monkeypatch.setattr("opsin.processes.supervisor.write_excluded", write)
    life = {"end": -6, "step": 9, "ids": [4, 5]}
    assert run(tmp_path, [life, life, life, {"end": 0}], quarantine_after=2) == 0
    assert [item.index for item in read_excluded(tmp_path / "run" / "put_aside.json")] == [4, 5]
    assert [crash["repeats"] for crash in crashes(tmp_path)] == [1, 2, 3]
    assert "cannot be left out (put_aside.json: No space left on device)" in crashes(tmp_path)[1]["message"]
    kinds = [event.kind for event in read_events(tmp_path / "run" / "events.jsonl")]
    assert kinds == ["crash", "crash", "crash", "put_aside"]


def test_the_supervisor_does_without_torch() -> None:
    text = "import sys, opsin.commands.main, opsin.processes.supervisor; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", text], check=True)
