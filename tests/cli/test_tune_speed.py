"""`opsin tune batch` and `opsin tune all` as a user types them: wrong input, an interruption, too little time."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.cli.commands import deviation, run_several
from tests.conftest import RunOpsin
from tests.digits_run import OVERRIDES, SMALL_VIT

TUNE = ("tune", "batch", "quickstart", *OVERRIDES, *SMALL_VIT)


def test_wrong_input_is_told_in_one_line(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    cases: dict[tuple[str, ...], tuple[int, str]] = {
        (*TUNE, "--minutes", "0"): (2, "command line: --minutes 0: must be above 0; use --minutes 5"),
        (*TUNE, "--minutes", "nan"): (2, "command line: --minutes nan: must be above 0; use --minutes 5"),
        ("tune", "all", *TUNE[2:], "--minutes", "-1"): (
            2,
            "command line: --minutes -1: must be above 0; use --minutes",
        ),
        ("tune", "all", *TUNE[2:], "--out", "full"): (2, "full: holds other files .notes.txt.; choose an empty or a"),
        (*TUNE, "--memory", "80"): (2, "command line: --memory 80: must be above 0 and at most 1; use 0.8"),
        (*TUNE, "--out", "full"): (2, "full: holds other files .notes.txt.; choose an empty or a new folder with"),
        (*TUNE, "batch_size=2000"): (2, "batch_size=2000: there are only 1438 training images"),
    }
    answers = run_several(list(cases), tmp_path, opsin_env)
    for (arguments, (status, words)), answer in zip(cases.items(), answers, strict=True):
        assert not deviation(answer, status, words), arguments


def test_an_interruption_shows_what_was_measured_and_leaves_nothing(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "opsin", *TUNE, "--out", "out"]
    tune = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**opsin_env, "TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tune.stderr is not None
    next(line for line in tune.stderr if "measuring accumulate=2" in line)
    tune.send_signal(signal.SIGINT)
    out, err = tune.communicate(timeout=60)
    assert tune.returncode == 3, err
    assert "accumulate=1: 256 images at a time (recipe)" in out
    assert "stopped before the end: nothing was decided" in out
    result = json.loads((tmp_path / "out" / "batch.json").read_text())
    assert not result["done"]
    assert len(result["rows"][0]["rates"]) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["batch.json"]
    assert not list((tmp_path / "tmp").glob("opsin*"))


def test_factors_without_time_are_named_and_nothing_is_gained(tmp_path: Path, run_opsin: RunOpsin) -> None:
    done = run_opsin("tune", "all", *TUNE[2:], "--minutes", "0.01", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "no time was left for: " in done.stdout
    assert done.stdout.splitlines()[-1] == "nothing gained: the recipe stays as it is"
    result = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert result["done"]
    assert result["found"] == {}
    assert len(result["factors"][0]["before"]["rates"]) == 3
    assert not (tmp_path / "out" / "tuned.yaml").exists()
