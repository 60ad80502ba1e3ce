"""The files of a split, and that training finds its way in them."""

import csv
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsin.data.curation.assignment import Fractions
from opsin.data.curation.collection import open_collection
from opsin.data.curation.split import SplitReport, SplitSettings, split
from opsin.data.sources.open import open_sources
from opsin.errors import ConfigError, DataError
from opsin.storage.teller import Silence
from tests.story import Story
from tests.unit.data.curation.scenes import classes, fill, scene

QUARTERS = Fractions(0.25, 0.25)


def split_into(source: Path | str, out: Path, **settings: object) -> SplitReport:
    wanted = SplitSettings(QUARTERS, **settings)  # type: ignore[arg-type]
    return split(open_collection(str(source)), out, wanted, Silence())


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_class_folders_hold_every_image_once_as_hard_links(tmp_path: Path) -> None:
    folder = classes(tmp_path / "images", a=8, b=12)
    report = split_into(folder, tmp_path / "out")
    written = files(tmp_path / "out")
    assert written - {"split.json"} == {
        f"{name}/{label}/{image.name}"
        for name in ("train", "val", "test")
        for label in "ab"
        for image in (tmp_path / "out" / name / label).iterdir()
    }
    assert len(written) == 21
    assert sorted(path.split("/", 1)[1] for path in written if "/" in path) == sorted(files(folder))
    for path in written - {"split.json"}:
        assert os.path.samefile(tmp_path / "out" / path, folder / path.split("/", 1)[1])
    assert report.counts == {"train": {"a": 4, "b": 6}, "val": {"a": 2, "b": 3}, "test": {"a": 2, "b": 3}}
    assert report.lines()[-1] == f"wrote 20 hard links; train with data.path={tmp_path / 'out'}"

    record = json.loads((tmp_path / "out" / "split.json").read_text())
    assert (record["source"], record["seed"], record["val"], record["near_duplicates"]) == (str(folder), 0, 0.25, 8)
    assert record["counts"] == report.counts


def test_training_finds_train_and_val_by_itself(tmp_path: Path) -> None:
    split_into(classes(tmp_path / "images", a=8, b=12), tmp_path / "out")
    opened = open_sources(str(tmp_path / "out"), cache=tmp_path)
    assert opened.train.classes == ("a", "b")
    assert opened.val is not None
    assert (len(opened.train), len(opened.val)) == (10, 5)
    assert opened.said.endswith("not used: test")

    split_into(tmp_path / "images", tmp_path / "lists", layout="lists")
    listed = open_sources(str(tmp_path / "lists" / "all.csv"), cache=tmp_path)
    assert listed.val is not None
    for folder, listing in ((opened.train, listed.train), (opened.val, listed.val)):
        assert sorted(Path(folder.location(i)).name for i in range(len(folder))) == sorted(
            Path(listing.location(i)).name for i in range(len(listing))
        )
        assert folder.labels.bincount().tolist() == listing.labels.bincount().tolist()
    alone = open_sources(str(tmp_path / "lists" / "test.csv"), cache=tmp_path)
    assert (len(alone.train), alone.val) == (5, None)
    assert alone.train.read(0).shape == (3, 40, 48)


def test_lists_stay_true_where_the_folder_is_a_link(tmp_path: Path) -> None:
    folder = classes(tmp_path / "deep" / "images", a=4)
    (tmp_path / "deep" / "place").mkdir()
    (tmp_path / "short").symlink_to(tmp_path / "deep" / "place")
    split_into(folder, tmp_path / "short" / "lists", layout="lists")
    assert len(open_sources(str(tmp_path / "short" / "lists" / "train.csv"), cache=tmp_path).train) == 2
    assert len(open_sources(str(tmp_path / "deep" / "place" / "lists" / "val.csv"), cache=tmp_path).train) == 1


def test_a_list_keeps_its_labels_also_empty_ones_and_those_that_are_names_of_splits(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{number}.png" for number in range(20)))
    rows = [(f"{number}.png", ("train", "val", "")[number % 3 if number < 18 else 2]) for number in range(20)]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    report = split_into(tmp_path / "list.csv", tmp_path / "out", layout="lists")
    found = {}
    for name in ("train", "val", "test"):
        with (tmp_path / "out" / f"{name}.csv").open(newline="") as file:
            found.update({Path(row["path"]).name: row["label"] for row in csv.DictReader(file)})
    assert found == dict(rows)
    assert report.counts["train"] == {"unlabelled": 4, "train": 2, "val": 2}


def test_images_without_labels_are_split_too(tmp_path: Path) -> None:
    fill(tmp_path / "flat", *(f"{number}.png" for number in range(8)))
    story = Story()
    report = split(open_collection(str(tmp_path / "flat")), tmp_path / "out", SplitSettings(QUARTERS), story)
    assert story.notices == ["these images have no labels: they are split without regard to classes"]
    assert {name: sum(of.values()) for name, of in report.counts.items()} == {"train": 4, "val": 2, "test": 2}
    assert len(list((tmp_path / "out" / "train").glob("*.png"))) == 4
    opened = open_sources(str(tmp_path / "out"), cache=tmp_path)
    assert opened.train.classes == ()


def test_images_that_are_no_files_are_written_with_their_bytes(tmp_path: Path) -> None:
    report = split_into("digits", tmp_path / "digits")
    assert "wrote 1,797 new files" in report.lines()[-1]
    again = open_collection(str(tmp_path / "digits"))
    digits = open_collection("digits")
    assert {again.read(i).numpy().tobytes() for i in range(len(again))} == {
        digits.read(i).numpy().tobytes() for i in range(len(digits))
    }
    assert (tmp_path / "digits" / "val" / "0").is_dir()


def test_names_that_occur_twice_are_kept_apart(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{folder}/same.png" for folder in "abcd"), "e/.hidden.png", "e/odd.PNG", "f/x.png", "f/y.png")
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["path", "label"], *([path, "all"] for path in sorted(files(tmp_path) - {"list.csv"}))]
        )
    split_into(tmp_path / "list.csv", tmp_path / "out", copy=True)
    found = [path for path in (tmp_path / "out").rglob("*.*") if path.suffix.lower() == ".png"]
    assert len(found) == 8
    assert not any(path.name.startswith(".") for path in found)
    assert {path.read_bytes() for path in found} == {path.read_bytes() for path in tmp_path.glob("?/*")}


def test_copies_are_files_of_their_own(tmp_path: Path) -> None:
    folder = classes(tmp_path / "images", a=4)
    report = split_into(folder, tmp_path / "out", copy=True)
    (copy,) = (tmp_path / "out" / "val" / "a").iterdir()
    assert not os.path.samefile(copy, folder / "a" / copy.name)
    assert copy.read_bytes() == (folder / "a" / copy.name).read_bytes()
    assert report.written == "4 copies"


def test_a_symbolic_link_becomes_a_link_to_its_file(tmp_path: Path) -> None:
    classes(tmp_path / "store", a=4)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for path in (tmp_path / "store" / "a").iterdir():
        (tmp_path / "images" / "a" / path.name).symlink_to(path)
    split_into(tmp_path / "images", tmp_path / "out")
    (only,) = (tmp_path / "out" / "val" / "a").iterdir()
    assert not only.is_symlink()
    assert os.path.samefile(only, tmp_path / "store" / "a" / only.name)


def test_duplicates_and_unreadable_images_are_listed(tmp_path: Path) -> None:
    folder = classes(tmp_path / "images", a=8, b=8)
    scene(2).resize((96, 80), Image.Resampling.BICUBIC).save(folder / "a" / "copy.png")
    (folder / "b" / "text.jpg").write_text("no image")
    report = split_into(folder, tmp_path / "out")
    with (tmp_path / "out" / "duplicates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["place"] for row in rows] == [f"{folder}/a/002.png", f"{folder}/a/copy.png"]
    assert len({row["split"] for row in rows}) == 1
    assert {row["class"] for row in rows} == {"a"}
    assert (tmp_path / "out" / rows[0]["split"] / "a" / "copy.png").exists()
    assert (tmp_path / "out" / "unreadable.txt").read_text().startswith(f"{folder}/b/text.jpg\tnot an image")
    assert not any("text.jpg" in path for path in files(tmp_path / "out"))
    lines = "\n".join(report.lines())
    assert "duplicates: 2 images in 1 group, each whole in one split (1 in " in lines
    assert "left out: 1 unreadable image, listed in" in lines


def test_two_runs_write_the_same(tmp_path: Path) -> None:
    folder = classes(tmp_path / "images", a=20, b=9)
    split_into(folder, tmp_path / "one")
    split_into(folder, tmp_path / "two")
    split_into(folder, tmp_path / "three", seed=5)
    assert files(tmp_path / "one") == files(tmp_path / "two") != files(tmp_path / "three")


def test_many_classes_are_told_by_their_ends(tmp_path: Path) -> None:
    folder = classes(tmp_path / "images", **{f"c{number:02d}": 4 + number // 20 for number in range(25)})
    lines = split_into(folder, tmp_path / "out").lines()
    assert lines[4] == "... 19 more classes, all in split.json"
    assert [line.split()[0] for line in (*lines[1:4], *lines[5:9])] == [
        "c00",
        "c01",
        "c02",
        "c22",
        "c23",
        "c24",
        "images",
    ]
    assert lines[8].split()[1:] == ["55", "25", "25"]


def test_what_is_in_the_way_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = classes(tmp_path / "images", a=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    faults: dict[Path, str] = {
        tmp_path / "full": "full: is not empty; a split is written into a new folder",
        tmp_path / "file": "file: is a file; a split is written into a new folder",
        folder / "out": "out: lies inside .*images, whose images would then be found twice",
        tmp_path / "file" / "out": "out: cannot be written: Not a directory; nothing is left there",
    }
    for out, fault in faults.items():
        with pytest.raises(DataError, match=fault):
            split_into(folder, out)
    assert files(tmp_path) == {"full/note", "file", *(f"images/a/{number:03d}.png" for number in range(4))}

    (tmp_path / "empty").mkdir()
    split_into(folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "train").is_dir()


def test_a_source_that_is_split_already_needs_merge(tmp_path: Path) -> None:
    fill(tmp_path / "images", *(f"{name}/a/{number}.png" for name in ("train", "val", "test") for number in range(4)))
    with pytest.raises(DataError, match=r"is split already \(train 4, validation 4, test 4 images\); .* or --merge"):
        split_into(tmp_path / "images", tmp_path / "out")
    report = split_into(tmp_path / "images", tmp_path / "out", merge=True)
    assert report.counts == {"train": {"a": 6}, "val": {"a": 3}, "test": {"a": 3}}


def test_what_folders_or_lists_cannot_hold_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{number}.png" for number in range(6)))

    def listing(name: str, labels: list[str]) -> Path:
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *((f"{n}.png", label) for n, label in enumerate(labels))])
        return tmp_path / name

    with pytest.raises(DataError, match="class 'a/b' cannot be the name of a folder; rename it, or use --as lists"):
        split_into(listing("slash.csv", ["a/b"] * 6), tmp_path / "out")
    with pytest.raises(DataError, match="2 of 6 images have no label, and class folders need one; label them"):
        split_into(listing("gaps.csv", ["a", "a", "a", "a", "", ""]), tmp_path / "out")
    with pytest.raises(ConfigError, match="--as lists: digits does not hold its images as files"):
        split_into("digits", tmp_path / "out", layout="lists")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / "a" / f"{number}.png")
    # No file may grow beyond this: less than one of these pictures.
    limit = 8 * 1024
    done = subprocess.run(
        [sys.executable, "-m", "opsin", "data", "split", "images", "--out", "out", "--copy"],
        cwd=tmp_path,
        # Else Python would leave cut-off bytecode of opsin behind.
        env={**opsin_env, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "opsin: out: cannot be written: File too large; nothing is left there: make room, or choose another --out"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
