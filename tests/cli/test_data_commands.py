"""`opsin data split`, `opsin data stats` and `opsin tune loader` as a user types them."""

import json
import shutil
from pathlib import Path

from tests.cli.commands import TINY, deviation, run_several
from tests.conftest import RunOpsin
from tests.unit.data.curation.scenes import classes, fill


def test_pictures_are_split_measured_and_trained(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    folder = classes(tmp_path / "pictures 🦉", a=24, b=24)
    shutil.copy(folder / "a" / "001.png", folder / "a" / "again.png")
    split = ("data", "split", folder.name, "--val", "0.2", "--test", "0.1", "--seed", "3")
    train = ("train", "quickstart", *(key for key in TINY if not key.startswith("data.path")), "--quiet")
    answers = run_several(
        [
            (*split, "--out", "split"),
            (*split, "--out", "lists", "--as", "lists", "--json"),
            ("data", "stats", "split", "--out", "report"),
            ("data", "stats", "split", "--json", "--near-duplicates", "off"),
            (*train, "data.path=split", "--out", "run"),
            (*train, "data.path=lists/all.csv", "--out", "run-of-lists"),
        ],
        tmp_path,
        opsin_env,
    )
    assert [answer.status for answer in answers] == [0] * 6, answers
    said, listed, report, numbers, run, run_of_lists = answers
    assert said.err == f"data: found 2 class folders in {folder.name}: 49 training images, no validation images\n"
    assert said.out.splitlines()[:4] == [
        "        train  val  test",
        "a          18    5     2",
        "b          17    5     2",
        "images     35   10     4",
    ]
    assert said.out.splitlines()[4].startswith("duplicates: 2 images in 1 group, each whole in one split (1 in ")
    assert said.out.endswith("wrote 49 hard links; train with data.path=split\n")
    assert json.loads(listed.out)["counts"]["val"] == {"a": 5, "b": 5}
    assert "images: 49 (train 35, validation 10, test 4)" in report.out
    assert "near-duplicates of training images" not in report.out
    assert report.out.endswith("wrote report/stats.html\n")
    assert (tmp_path / "report" / "samples.png").stat().st_size > 1000
    assert json.loads(numbers.out)["duplicates"]["exact_groups"] == 1
    assert (run.out, run.err, run_of_lists.out, run_of_lists.err) == ("", "", "", "")


def test_wrong_input_is_one_clear_line(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    classes(tmp_path / "pictures", a=12, rose=2)
    fill(tmp_path / "apart", *(f"{name}/a/{number}.png" for name in ("train", "val") for number in range(3)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no images")
    split = ("data", "split", "pictures", "--out", "out")
    cases: dict[tuple[str, ...], str] = {
        ("data", "split", "nowhere", "--out", "out"): "nowhere: no such file or folder; .*check the path",
        ("data", "stats", "nowhere"): "nowhere: no such file or folder; .*check the path",
        ("data", "stats", "empty"): "empty: no images in this folder",
        ("data", "stats", "notes.txt"): "notes.txt: not a known kind of file",
        ("data", "stats", "pictures", "--near-duplicates", "40"): "command line: --near-duplicates 40: of the 128 bits",
        ("data", "stats", "pictures", "--out", "notes.txt"): "notes.txt: cannot be written: File exists",
        (*split, "--val", "0.5", "--test", "0.5"): "command line: --val 0.5 --test 0.5: together 1, but below 1",
        split: "pictures: class rose has 2 images; train, val and test need one each: add images, ",
        (*split, "--test", "0", "--near-duplicates", "-1"): "command line: --near-duplicates -1: of the 128 bits",
        ("data", "split", "pictures", "--out", "apart"): "apart: is not empty; a split is written into a new folder",
        ("data", "split", "apart", "--out", "out"): r"apart: is split already \(train 3, validation 3 images\); ",
        ("tune", "loader", "quickstart", "--seconds", "0"): "command line: --seconds 0: must be above 0",
        ("tune", "loader", "quickstart", "epoch=3"): "command line: epoch: unknown key; did you mean epochs[?]",
        ("tune", "loader", "quickstart", "data.path=nowhere"): "nowhere: no such file or folder",
    }
    answers = run_several(list(cases), tmp_path, opsin_env)
    faults = {}
    for (command, fault), answer in zip(cases.items(), answers, strict=True):
        # What was found is told before.
        told = answer._replace(
            err="".join(line for line in answer.err.splitlines(True) if not line.startswith("data: "))
        )
        if found := deviation(told, 2, fault):
            faults[" ".join(command)] = found
    assert not faults, faults
    assert not (tmp_path / "out").exists()


def test_the_loader_is_tuned_and_nothing_is_left(tmp_path: Path, run_opsin: RunOpsin) -> None:
    keys = (*(key for key in TINY if not key.startswith("data.")), "data.path=digits")
    (tmp_path / "t").mkdir()
    done = run_opsin(
        *("tune", "loader", "quickstart", "--seconds", "0.02", "--json", *keys), env={"TMPDIR": str(tmp_path / "t")}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["rates"][0]["setting"] == {"workers": 0, "prefetch": 2, "resident": False}
    assert report["best"].startswith("data.")
    assert f"best: {report['best']}" in report["verdict"]
    assert done.stderr.splitlines()[0].startswith("data: found the digits")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert list((tmp_path / "t").glob("opsin-*")) == []
