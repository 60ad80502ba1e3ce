"""A person sees progress; a file gets plain lines; a closed pipe stops nothing."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opsin.reporting.console import Console, LiveConsole, describe, duration, open_console
from opsin.reporting.sinks import TextLog
from tests.story import Calm

VALUES = {"train/loss": 0.4123, "train/top1": 0.978, "train/images_per_s": 4512.3, "train/lr": 3e-4}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_all(console: Console) -> None:
    console.notice("precision: bf16")
    console.start(total_steps=100, first_step=0, total_epochs=10)
    for step in range(1, 11):
        console.progress(step, step / 10, VALUES)
    console.epoch(1, {"train/loss": 0.4123, "val/top1": 0.97}, best={"val/top1": 0.98}, seconds=80)
    console.warning("the disk [full]")
    console.finish("done")


def test_without_a_terminal_lines_are_plain() -> None:
    stream = io.StringIO()
    show_all(Console(stream, every_s=0.0))
    lines = stream.getvalue().splitlines()
    assert stream.getvalue().isprintable() or "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "precision: bf16"
    assert lines[1].startswith("epoch 0.10/10  step 1/100  loss 0.4123  top1 97.80 %  4,512 images/s  lr 0.0003  ")
    assert lines[-3] == "epoch 1/10  loss 0.4123  val top1 97.00 %  best val top1 98.00 %  1 min 20 s"
    assert lines[-2:] == ["warning: the disk [full]", "done"]


def test_progress_without_a_terminal_is_rare() -> None:
    stream = io.StringIO()
    show_all(Console(stream))
    assert len(stream.getvalue().splitlines()) == 4


@pytest.mark.parametrize(("a_step", "said"), [(2.0, ["about 3 min 8 s for 94 more steps at this pace"]), (0.1, [])])
def test_a_long_training_says_once_how_long_it_takes(
    a_step: float, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = io.StringIO()
    console = Console(stream, every_s=1e9)
    console.start(total_steps=100, first_step=0, total_epochs=1)
    for step in range(1, 80):
        now += 30.0 if step == 1 else a_step  # kernels are chosen in the first step
        console.progress(step, step / 100, VALUES)
    assert stream.getvalue().splitlines() == said


def test_a_terminal_gets_a_bar_and_every_line() -> None:
    stream = Terminal()
    console = open_console(stream=stream)
    assert isinstance(console, LiveConsole)
    show_all(console)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    for line in ("precision: bf16", "warning: the disk [full]", "best val top1 98.00 %", "done"):
        assert line in text
    console.finish()


def test_quiet_leaves_warnings_only_but_the_log_gets_all(tmp_path: Path) -> None:
    stream = Terminal()
    show_all(open_console(stream=stream, quiet=True, log=TextLog(tmp_path, Calm())))
    assert stream.getvalue() == "warning: the disk [full]\n"
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4


def test_a_reader_who_left_stops_nothing() -> None:
    stream = io.StringIO()
    console = Console(stream, every_s=0.0)
    stream.close()
    show_all(console)


def test_letters_that_the_terminal_lacks_stop_nothing() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    Console(stream).notice("class 猫")
    stream.seek(0)
    assert stream.read() == "class ?\n"


def test_rich_is_imported_on_a_terminal_only(opsin_env: dict[str, str]) -> None:
    program = (
        "import sys, io; from opsin.reporting.console import open_console; c = open_console(stream=io.StringIO());"
        "c.start(total_steps=2, first_step=0, total_epochs=1); c.progress(1, 0.5, {}); c.finish();"
        "import opsin.reporting.journal, opsin.reporting.sinks;"
        "print([m for m in ('rich', 'torch', 'tensorboard', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=opsin_env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.2, "8.2 s"), (59.96, "1 min 0 s"), (80, "1 min 20 s"), (7500, "2 h 5 min"), (273600, "3 d 4 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_describe() -> None:
    assert describe({"train/loss": 0.5, "val/top5": 1.0, "x": 2}) == "loss 0.5  val top5 100.00 %  x 2"
