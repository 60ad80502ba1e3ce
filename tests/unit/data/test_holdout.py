"""Held-out images: stratified, seeded, disjoint."""

import pickle
from pathlib import Path

import pytest
import torch

from opsin.data.holdout import Subset, hold_out
from opsin.data.sources.digits import load_digits
from opsin.data.sources.files import Files, label_files
from opsin.errors import DataError


def source_with(tmp_path: Path, labels: list[str | None]) -> Files:
    return label_files(tmp_path, [f"{index}.png" for index in range(len(labels))], labels)


def test_parts_are_disjoint_complete_and_in_order() -> None:
    train, val = hold_out(load_digits(), 0.2, seed=3)
    assert sorted([*train.indices.tolist(), *val.indices.tolist()]) == list(range(1797))
    assert train.indices.tolist() == sorted(train.indices.tolist())


def test_every_class_gives_its_share() -> None:
    digits = load_digits()
    _, val = hold_out(digits, 0.2, seed=3)
    for label in range(10):
        assert (val.labels == label).sum() == round(0.2 * int((digits.labels == label).sum()))


def test_the_split_depends_on_the_seed_only() -> None:
    digits = load_digits()
    first, again, other = (hold_out(digits, 0.2, seed)[1].indices for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_each_part_has_every_class_where_possible(tmp_path: Path) -> None:
    labels: list[str | None] = [*["a"] * 2, *["b"] * 30, "lone"]
    train, val = hold_out(source_with(tmp_path, labels), 0.01, seed=0)
    assert torch.bincount(val.labels, minlength=3).tolist() == [1, 1, 0]
    train, val = hold_out(source_with(tmp_path, labels), 0.99, seed=0)
    assert torch.bincount(train.labels, minlength=3).tolist() == [1, 1, 1]


def test_unlabelled_images_are_held_out_as_one_class(tmp_path: Path) -> None:
    train, val = hold_out(source_with(tmp_path, [None] * 10), 0.3, seed=0)
    assert (len(train), len(val)) == (7, 3)


def test_a_source_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.holdout=0\.1"):
        hold_out(source_with(tmp_path, ["a", "b"]), 0.1, seed=0)


def test_a_subset_is_a_source() -> None:
    digits = load_digits()
    subset = Subset("some", digits, torch.tensor([5, 1700]))
    assert len(subset) == 2
    assert subset.labels.tolist() == digits.labels[[5, 1700]].tolist()
    assert torch.equal(subset.read(1), digits.read(1700))
    assert subset.location(1) == "scikit-learn digits 1700"
    assert torch.equal(pickle.loads(pickle.dumps(subset)).read(0), subset.read(0))
