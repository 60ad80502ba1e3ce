"""Training that fails, is stopped or is broken off: the exit status, the reason, and what is left."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import Answer, deviation, pictures, run_several, train


def test_training_that_fails_or_runs_out_of_time_says_why(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    pictures(tmp_path / "pictures")
    answers = run_several(
        [
            train("optim.lr=1e30", "epochs=20", out="diverged"),
            train("model.width=200000", out="large"),
            train("limits.hours=1e-9", out="timed"),
            ("resume", "timed", "limits.hours=null", "--quiet"),
        ],
        tmp_path,
        opsin_env,
    )
    diverged, large, timed, resumed = answers
    why = r"step \d+: loss nan, and so were the 19 updates before it; .*allows 20.* Lower optim.lr"
    assert deviation(diverged, 4, why) == ""
    assert diverged.out.startswith("warning: step ")
    assert (
        deviation(large, 4, "out of memory at batches of up to 8 images and accumulate=1: raise accumulate, or lower ")
        == ""
    )
    stopped = "limits.hours = 1e-09 reached: stopped after step 1 of 4, which is saved; opsin resume timed goes on"
    assert deviation(timed, 3, stopped) == ""
    assert resumed == (0, "", "")


def test_an_exception_in_training_leaves_a_checkpoint(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    pictures(tmp_path / "pictures")
    program = (
        "import sys\n"
        "from opsin.commands.main import main\n"
        "from opsin.methods.supervised import Supervised\n"
        "forward = Supervised.forward\n"
        "def fragile(self, batch, clock):\n"
        "    if clock.step == 3:\n"
        "        raise ValueError('a fault of my own')\n"
        "    return forward(self, batch, clock)\n"
        "Supervised.forward = fragile\n"
        "first = main(sys.argv[1:])\n"
        "Supervised.forward = forward\n"
        "print(first, main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *train("checkpoints.every=never")],
        cwd=tmp_path,
        env=opsin_env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "4 0\n"
    assert "ValueError: a fault of my own" in done.stderr, "the author of a method needs the place"
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["kind"], event.get("reason")) for event in events] == [
        (0, "stage", None),
        (3, "checkpoint", "emergency"),
        (3, "failed", "a fault of my own"),
        (3, "resumed", None),
        (4, "checkpoint", "last step"),
        (4, "best", None),
        (4, "done", None),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_training_with_a_checkpoint(
    number: signal.Signals, tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    pictures(tmp_path / "pictures")
    process = subprocess.Popen(
        [sys.executable, "-m", "opsin", *train("epochs=100000")],
        cwd=tmp_path,
        env=opsin_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, tmp_path / "run" / "checkpoints")
    process.send_signal(number)
    out, err = process.communicate(timeout=180)
    stopped = rf"{number.name}: stopped after step \d+ of 200000, which is saved; opsin resume run goes on"
    assert deviation(Answer(process.returncode, out, err), 3, stopped) == ""
    step = int(err.split("after step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_ends_without_a_traceback(
    number: signal.Signals, tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "opsin", *train("data.path=digits")],
        cwd=tmp_path,
        env=opsin_env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    # Python tells each import when it is over. (While it loads numpy, torch swallows interrupts.)
    while "torch.optim" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 3
    assert "Traceback" not in err
    # Python's own lines are among ours, and the signal may tear one. Where an import swallows it, the first step ends.
    told = err.splitlines()[-1]
    assert re.fullmatch(
        f"opsin: {number.name}: (stopped before the end; the same command begins again, from the newest checkpoint "
        r"where there is one|stopped after step \d+ of \d+, which is saved; opsin resume run goes on)",
        told,
    ), told


def wait_for(process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + 180
    while not any(folder.glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
