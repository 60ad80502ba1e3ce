"""Unreadable images are replaced by a function of seed and index, listed once, and limited."""

from pathlib import Path

import pytest
import torch

from opsin.clock.seeding import fold_in
from opsin.data.quarantine import Quarantine, read_or_replace
from opsin.data.sources.files import Files, label_files
from opsin.errors import DataError
from tests.unit.data.pictures import fill


def images(tmp_path: Path, count: int, bad: set[int]) -> Files:
    names = [f"{index % 3}/{index}.png" for index in range(count)]
    fill(tmp_path, *names)
    for index in bad:
        (tmp_path / names[index]).write_text("no picture")
    return label_files(tmp_path, names, [name.split("/")[0] for name in names])


def test_a_readable_image_is_read(tmp_path: Path) -> None:
    source = images(tmp_path, 4, set())
    read = read_or_replace(source, 2, seed=0)
    assert torch.equal(read.image, source.read(2))
    assert (read.index, read.label, read.failures) == (2, 2, ())


def test_the_replacement_follows_from_seed_and_index(tmp_path: Path) -> None:
    source = images(tmp_path, 30, {4})
    for seed in range(5):
        expected = fold_in(seed, 4, 1) % 30
        read = read_or_replace(source, 4, seed)
        assert read.index == expected
        assert read.label == int(source.labels[expected])
        assert torch.equal(read.image, source.read(expected))
        assert [(failure.sample, failure.location) for failure in read.failures] == [(4, source.location(4))]


def test_unreadable_replacements_are_reported_and_passed_over(tmp_path: Path) -> None:
    first, second = fold_in(7, 0, 1) % 40, fold_in(7, 0, 2) % 40
    assert len({0, first, second}) == 3
    read = read_or_replace(images(tmp_path, 40, {0, first}), 0, seed=7)
    assert read.index == second
    assert [failure.sample for failure in read.failures] == [0, first]


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0\.png: unreadable \(not an image.*\(4 of the 4 images"):
        read_or_replace(images(tmp_path, 4, {0, 1, 2, 3}), 0, seed=0)


def test_the_list_is_sorted_and_has_no_duplicates_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.txt"
    first = Quarantine(path, total=100, limit=0.5)
    first.add(9, "b.jpg", "truncated")
    first.add(3, "a.jpg", "no image")
    first.add(9, "b.jpg", "truncated")
    assert path.read_text() == "a.jpg\tno image\nb.jpg\ttruncated\n"
    resumed = Quarantine(path, total=100, limit=0.5)
    resumed.add(9, "b.jpg", "truncated")
    resumed.add(11, "aa.jpg", "no image")
    assert len(resumed) == 3
    assert path.read_text() == "a.jpg\tno image\naa.jpg\tno image\nb.jpg\ttruncated\n"


def test_strange_names_keep_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.txt"
    names = ["tab\there", "line\nbreak", "para\u2029graph", "not utf-8 \udcff"]
    for _ in range(2):
        quarantine = Quarantine(path, total=100, limit=1.0)
        for index, name in enumerate(names):
            quarantine.add(index, name, "why\nnot")
    assert len(path.read_bytes().splitlines()) == len(Quarantine(path, 100, 1.0)) == 4


def test_too_many_are_an_error_that_names_the_first_and_the_rule(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.txt", total=200, limit=0.02)
    for index in range(4):
        quarantine.add(index, f"{index}.jpg", "bad")
    with pytest.raises(DataError) as caught:
        quarantine.add(4, "4.jpg", "bad")
    (fault,) = caught.value.faults
    assert fault.startswith("5 of 200 images are unreadable: 0.jpg (bad), 1.jpg (bad), 2.jpg (bad), ...; ")
    assert "data.max_unreadable=0.02 allows 4" in fault
    assert str(tmp_path / "quarantine.txt") in fault
    assert "\n" not in fault


def test_a_run_that_goes_on_is_held_to_the_same_limit(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.txt"
    path.write_text("a\tbad\nb\tbad\n")
    with pytest.raises(DataError):
        Quarantine(path, total=100, limit=0.01).add(0, "a", "bad")


def test_without_a_file_it_only_counts() -> None:
    quarantine = Quarantine(None, total=10, limit=0.1)
    quarantine.add(0, "a", "bad")
    assert len(quarantine) == 1
