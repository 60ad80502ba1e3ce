"""`opsin sweep` as a user types it."""

from pathlib import Path

from tests.cli.commands import TINY, deviation, pictures, run_several
from tests.conftest import RunOpsin

SWEEP = ("sweep", "quickstart", *TINY, "optim.lr=0.001,0.01", "--metric", "val/top1")


def test_runs_are_trained_in_processes_and_the_table_names_the_best(tmp_path: Path, run_opsin: RunOpsin) -> None:
    pictures(tmp_path / "pictures")
    done = run_opsin(*SWEEP, "--out", "sweep", "data.image_size=8")
    assert done.returncode == 0, done.stderr
    assert "rung 1 of 1, 2 to go: 000-lr=0.001 to step 4 of 4" in done.stderr
    assert "best: sweep/00" in done.stdout
    assert "again: opsin train quickstart epochs=2 " in done.stdout
    folders = {path.name for path in (tmp_path / "sweep").iterdir() if not path.name.startswith(".")}
    assert folders == {"000-lr=0.001", "001-lr=0.01", "recipes", "sweep.json", "tuned.yaml"}


def test_wrong_input_is_told_in_one_line(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    pictures(tmp_path / "pictures")
    cases: dict[tuple[str, ...], tuple[int, str]] = {
        ("sweep", "quickstart", "--metric", "val/top1"): (2, "command line: no key has several values; give one with"),
        (*SWEEP, "--eta", "1"): (2, "command line: --eta 1: must be at least 2; use 3"),
        (*SWEEP, "--out", "pictures"): (2, "pictures: holds other files; choose an empty or a new folder with --out"),
        (*SWEEP, "optim.lrr=1"): (2, "command line: optim.lrr: unknown key; did you mean optim.lr"),
        (*SWEEP, "data.path=nowhere"): (2, "nowhere: no such file or folder"),
    }
    answers = run_several(list(cases), tmp_path, opsin_env)
    for (arguments, (status, words)), answer in zip(cases.items(), answers, strict=True):
        assert not deviation(answer, status, words), arguments
