"""Commands that work, in places and with streams that are not the usual ones."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import opsin
from tests.cli.commands import TINY, deviation, run_several
from tests.unit.data.pictures import fill

OPSIN = f"{shlex.quote(sys.executable)} -m opsin"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return fill(tmp_path / "pictures", *(f"{name}/{number}.png" for name in "ab" for number in range(12)))


def shell(command: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command as bash runs it; its exit status is that of the first part of a pipe."""
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def status(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["status"])


def test_a_run_goes_from_pictures_to_an_encoder(pictures: Path, tmp_path: Path, opsin_env: dict[str, str]) -> None:
    for folder in (pictures, pictures / "a"):
        for name in (".DS_Store", "._1.png", "Thumbs.db", "desktop.ini", "notes.txt"):
            (folder / name).write_bytes(b"\0not an image")
    run = tmp_path / "my first run, with ümläuts 🦉"
    home = Path(opsin_env["HOME"])
    answers = run_several(
        [
            ("train", "quickstart", *TINY, "data.path=~/pictures", "--out", str(run), "--quiet"),
            ("train", "quickstart", *TINY, "data.path=~/pictures", f"--out=~/{run.name}", "--quiet"),
            ("eval", run.name, "--json"),
            ("eval", f"{run.name}/checkpoints/step-00000002", "accuracy"),
            ("export", run.name),
            ("runs", ".", "--json"),
            ("resume", f"./{run.name}", "epochs=3", "--quiet"),
        ],
        tmp_path,
        opsin_env,
    )
    assert home == tmp_path
    assert [(answer.status, answer.err) for answer in answers] == [(0, "")] * len(answers)
    train, again, scores, earlier, export, runs, resume = (answer.out for answer in answers)
    assert train == again == resume == ""
    assert json.loads(scores)["accuracy"]["images"] == 4
    assert earlier.startswith("top-1 ")
    assert export == f"wrote {run.name}/export\n"
    listed = json.loads(runs)
    assert (listed["name"], listed["status"], listed["step"]) == (run.name, "done", 4)
    assert not (run / "quarantine.txt").exists()
    assert opsin.load(run)(torch.zeros(2, 3, 8, 8)).shape == (2, 16)


def test_streams_may_be_closed_poor_or_full(pictures: Path, tmp_path: Path, opsin_env: dict[str, str]) -> None:
    train = f"{OPSIN} train quickstart {shlex.join(TINY)}"
    done = shell(f"{train} --out closed <&- >&-", tmp_path, {**opsin_env, "TERM": "dumb"})
    assert (done.returncode, done.stderr) == (0, "")
    assert status(tmp_path / "closed") == "done"

    done = shell(f"{train} --out read | head -n 1", tmp_path, opsin_env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("device: cpu")
    assert status(tmp_path / "read") == "done"

    done = shell(f"{OPSIN} recipes > /dev/full", tmp_path, opsin_env)
    assert (done.returncode, done.stderr) == (4, "opsin: [Errno 28] No space left on device\n")

    (tmp_path / "closed").rename(tmp_path / "süß")
    done = shell(f"{OPSIN} runs .", tmp_path, {**opsin_env, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "s??   done" in done.stdout


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no folder that not even root can write")
def test_the_working_directory_may_be_read_only(pictures: Path, tmp_path: Path, opsin_env: dict[str, str]) -> None:
    keys = ("train", "quickstart", *TINY, f"data.path={pictures}", "limits.steps=1", "--quiet")
    elsewhere, here = run_several([(*keys, "--out", str(tmp_path / "run")), keys], Path("/proc"), opsin_env)
    assert elsewhere == (0, "", "")
    assert deviation(here, 2, "runs/quickstart: cannot be written: .*choose another folder with --out") == ""


def test_python_takes_what_the_command_line_takes(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_switches: None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = dict(text.split("=", 1) for text in TINY if not text.startswith(("data.", "epochs", "log")))
    given: dict[str, Any] = {key: int(value) if value.isdecimal() else value for key, value in keys.items()}
    given["data.path"] = pictures.rename(tmp_path / "pictures 🦉")
    opsin.train("quickstart", out="~/run", epochs=1, log={"tensorboard": False}, **{**given, "data.workers": 0})
    assert status(tmp_path / "run") == "done"
    assert os.listdir(tmp_path / "run" / "checkpoints")
