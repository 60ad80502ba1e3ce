"""Supervised trainings that really crash: they are started again, and end as if nothing had been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opsin.reporting.journal import read_events
from opsin.storage.directory import RunDirectory
from opsin.storage.listing import last_step
from tests.cli.commands import pictures, train
from tests.conftest import RunOpsin

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

# Read by every Python process that finds it on its path, workers included.
DEADLY = """
import os, signal, sys, threading

def see(event, arguments):
    if event == "open" and str(arguments[0]).endswith("b/3.png"):
        signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)  # as in native code: of this thread

sys.addaudithook(see)
"""


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, run_opsin: RunOpsin, opsin_env: dict[str, str]
) -> None:
    pictures(tmp_path / "pictures", count=40)
    keys = ("epochs=30", "checkpoints.every=5 steps", "log.every=1")
    command = [sys.executable, "-m", "opsin", *train(*keys), "--restarts", "2"]
    supervisor = subprocess.Popen(command, cwd=tmp_path, env=opsin_env, stdout=subprocess.PIPE, text=True)
    run = RunDirectory(tmp_path / "run")
    while (last_step(run.metrics) or 0) < 12:
        assert supervisor.poll() is None
        time.sleep(0.01)
    child: int = json.loads((run.path / ".lock").read_text())["pid"]
    assert child != supervisor.pid
    os.kill(child, signal.SIGKILL)
    said, _ = supervisor.communicate(timeout=180)
    assert supervisor.returncode == 0
    assert re.search(r"training crashed (in or right after|before) update \d+: killed", said)
    (crash,) = (event for event in read_events(run.events) if event.kind == "crash")
    assert str(crash.facts["cause"]).startswith("killed")
    assert run_opsin(*train(*keys, out="straight")).returncode == 0
    assert weights(run.path) == weights(tmp_path / "straight")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_kills_its_reader_is_found_and_left_out(
    tmp_path: Path, run_opsin: RunOpsin, opsin_env: dict[str, str], workers: int
) -> None:
    pictures(tmp_path / "pictures")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY)
    paths = os.pathsep.join([str(tmp_path / "site"), opsin_env["PYTHONPATH"]])
    keys = (
        f"data.workers={workers}",
        "data.resident=false",
        "data.holdout=0",
        "data.max_unreadable=0.1",
        "evaluators.val=null",
    )
    supervision = ("--restarts", "3", "--quarantine-after", "1")
    done = run_opsin(*train(*keys), *supervision, env={"PYTHONPATH": paths})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "b/3.png" in done.stdout
    (aside,) = json.loads((tmp_path / "run" / "put_aside.json").read_text())
    assert str(aside["place"]).endswith("b/3.png")
    assert "b/3.png\ttraining crashed with it 1 times" in (tmp_path / "run" / "quarantine.txt").read_text()
    if workers:
        return
    # Whoever trains this run later does the same, supervised or not.
    again = run_opsin("resume", "run", "epochs=3", "--quiet", env={"PYTHONPATH": paths})
    assert again.returncode == 0, again.stderr


def test_a_supervisor_that_is_killed_takes_the_training_with_it(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    pictures(tmp_path / "pictures")
    command = [sys.executable, "-m", "opsin", *train("epochs=100000", "log.every=1"), "--restarts", "2"]
    supervisor = subprocess.Popen(command, cwd=tmp_path, env=opsin_env, stderr=subprocess.DEVNULL)
    run = RunDirectory(tmp_path / "run")
    while (last_step(run.metrics) or 0) < 3:
        assert supervisor.poll() is None
        time.sleep(0.01)
    supervisor.kill()
    supervisor.wait()
    end = time.monotonic() + 120
    while json.loads(run.run_json.read_text())["status"] == "running":
        assert time.monotonic() < end
        time.sleep(0.05)
    assert json.loads(run.run_json.read_text())["status"] == "stopped"
