"""The report on a set of images: its numbers, its warnings in words, and the files it writes."""

import base64
import csv
import html.parser
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from opsin.data.curation.collection import open_collection
from opsin.data.curation.stats import Stats
from opsin.data.curation.stats_page import report_stats
from opsin.errors import DataError
from opsin.run.recipe import read
from opsin.storage.teller import Silence
from tests.unit.data.curation.scenes import classes, fill, scene


def report(path: Path, out: Path | None = None, max_bits: int | None = 8) -> Stats:
    return report_stats(open_collection(str(path)), Silence(), out=out, max_bits=max_bits)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """40 daisies and 4 roses, one of each copied into validation; one unreadable rose."""
    folder = tmp_path / "pictures"
    classes(folder / "train", daisy=40, rose=4)
    fill(folder / "val", "daisy/x.png", "daisy/y.png", "rose/x.png", first_seed=100)
    scene(7).resize((96, 80), Image.Resampling.BICUBIC).save(folder / "val" / "daisy" / "larger.png")
    shutil.copy(folder / "train" / "rose" / "001.png", folder / "val" / "rose" / "same.png")
    shutil.copy(folder / "train" / "rose" / "002.png", folder / "train" / "daisy" / "no-daisy.png")
    scene(500, width=300, height=50).save(folder / "train" / "daisy" / "wide.jpg")
    (folder / "train" / "rose" / "text.png").write_text("a rose is a rose")
    return folder


def test_numbers_and_warnings(pictures: Path) -> None:
    stats = report(pictures)
    assert stats.counts == {"train": {"daisy": 42, "rose": 5}, "validation": {"daisy": 3, "rose": 2}}
    assert (stats.num_images, stats.per_class) == (52, {"daisy": 45, "rose": 7})
    assert (stats.sizes.smallest, stats.sizes.largest) == ((48, 40), (300, 50))
    assert stats.sizes.largest_place == f"{pictures}/train/daisy/wide.jpg"
    assert (stats.sizes.distinct, stats.sizes.shorter_side) == (3, (40, 40, 40))
    assert stats.formats == {"PNG": 50, "JPEG": 1}
    copies = stats.duplicates
    assert (copies.groups, copies.exact_groups, copies.images) == (3, 2, 6)
    assert copies.leaks == {"validation in train": 2}
    assert list(stats.warnings) == [
        "1 image cannot be read (1.92% of all; a run allows data.max_unreadable)",
        "2 validation images are near-duplicates of training images: scores on them mean little; opsin data split "
        "--merge makes other splits and keeps copies together",
        f"1 group of duplicates has several labels: {pictures}/train/daisy/no-daisy.png (daisy) and "
        f"{pictures}/train/rose/002.png (rose)",
    ]
    lines = stats.lines()
    assert lines[0] == "images: 52 (train 47, validation 5)"
    assert lines[1] == "classes: daisy 45, rose 7"
    assert f"  {pictures}/train/rose/text.png: not an image, it starts with b'a rose is a '" in lines
    assert lines[-1] == f"warning: {stats.warnings[-1]}"


def test_a_small_class_is_named_with_its_number(tmp_path: Path) -> None:
    stats = report(classes(tmp_path, daisy=42, rose=3))
    assert list(stats.warnings) == ["class rose has 3 images, 14 times fewer than daisy"]
    report_of_many = report(classes(tmp_path / "many", big=30, **{f"s{number}": 1 for number in range(5)}))
    assert [text for text in report_of_many.warnings if "fewer" in text or "more" in text] == [
        *(f"class s{number} has 1 image, 30 times fewer than big" for number in range(3)),
        "2 more classes are 10 or more times smaller than big",
    ]


def test_without_near_duplicates_only_equal_pixels_count(pictures: Path) -> None:
    assert report(pictures, max_bits=None).duplicates.groups == 2


def test_mean_and_std_can_be_pasted_into_a_recipe(tmp_path: Path) -> None:
    stats = report(classes(tmp_path, a=3, b=3))
    recipe = read("quickstart", stats.keys.split())
    assert recipe.data.mean == pytest.approx(stats.mean, abs=5e-5)
    assert recipe.data.std == pytest.approx(stats.std, abs=5e-5)


class Page(html.parser.HTMLParser):
    """Collects what a page shows, and sees that its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: list[bytes] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                prefix = "data:image/png;base64,"
                if (value or "").startswith(prefix):
                    self.images.append(base64.b64decode((value or "").removeprefix(prefix)))
                else:
                    self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_everything_and_needs_no_other_file(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    stats = report(pictures, out)
    page = Page((out / "stats.html").read_text())
    assert page.open == page.links == []
    on_disk = [(out / name).read_bytes() for name in ("samples.png", "sizes.png", "duplicates.png")]
    assert page.images == on_disk
    text = "\n".join(page.texts)
    for shown in (*stats.warnings, stats.keys, "daisy", f"{pictures}/train/rose/text.png"):
        assert shown in text
    assert json.loads((out / "stats.json").read_text())["counts"] == stats.counts
    assert (out / "unreadable.txt").read_text().startswith(f"{pictures}/train/rose/text.png\t")
    with (out / "duplicates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    assert {row["split"] for row in rows} == {"train", "validation"}


def test_the_sample_grid_shows_the_images(tmp_path: Path) -> None:
    folder = classes(tmp_path / "pictures", a=0, b=0)
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        for number in range(2):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + number, 20), colour).save(folder / name / f"{number}.png")
    report(folder, tmp_path / "out")
    grid = Image.open(io.BytesIO((tmp_path / "out" / "samples.png").read_bytes())).convert("RGB")
    colours = {colour: number for number, colour in grid.getcolors(1 << 20) or []}
    # Two cells of 96 x 96 pixels each; the wider picture leaves a line free above and below.
    for colour in ((255, 0, 0), (0, 0, 255)):
        assert 0.9 * 2 * 96**2 <= colours[colour] <= 2 * 96**2
    blue, red = (grid.getpixel((190 + 48, y)) for y in (10 + 48, 10 + 100 + 48))
    assert (blue, red) == ((0, 0, 255), (255, 0, 0))


def test_names_may_hold_any_letters(tmp_path: Path) -> None:
    folder = classes(tmp_path / "pic<b>tures", **{"<b>&$x$": 2, "日本 $": 2, "a" * 60: 2})
    report(folder, tmp_path / "out")
    page = Page((tmp_path / "out" / "stats.html").read_text())
    assert page.open == []
    assert {"<b>&$x$", "日本 $", "a" * 60} <= set(page.texts)


def test_images_of_one_size_and_without_labels(tmp_path: Path) -> None:
    fill(tmp_path / "flat", *(f"{number}.png" for number in range(70)))
    stats = report(tmp_path / "flat", tmp_path / "out")
    lines = stats.lines()
    assert lines[:2] == ["images: 70", "sizes: all 48 x 40"]
    assert "duplicates: 0 images in 0 groups" in lines
    assert stats.warnings == ()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"stats.html", "stats.json", "samples.png"}
    with Image.open(tmp_path / "out" / "samples.png") as grid:
        assert grid.height > 8 * 96


def test_a_second_report_replaces_the_first(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report(pictures, out)
    shutil.rmtree(pictures / "val")
    (pictures / "train" / "rose" / "text.png").unlink()
    (pictures / "train" / "daisy" / "no-daisy.png").unlink()
    report(pictures, out)
    assert {path.name for path in out.iterdir()} == {"stats.html", "stats.json", "samples.png", "sizes.png"}
    assert not re.search("duplicates.png", (out / "stats.html").read_text())


def test_places_that_cannot_be_written_are_named(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file: cannot be written: File exists; make room, or choose another --out"):
        report(pictures, tmp_path / "file")
    with pytest.raises(DataError, match=r"lies inside .*pictures, whose images would then be found twice"):
        report(pictures, pictures / "report")
    assert not (pictures / "report").exists()
