"""Images to learn from and to score: all labelled, no class favoured, faults told before the first step."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsin.data.sources.labels import no_labels
from opsin.errors import ConfigError
from opsin.evaluation.labelled import spread_classes
from opsin.training.evaluator import LabelledChoice, StillData
from tests.unit.data.pictures import fill
from tests.unit.evaluation.digits import digits_at, images_of

TRAIN, VAL = slice(1437), slice(1437, None)


def labels_of(data: StillData) -> Tensor:
    return torch.cat([batch.labels for batch in data.batches(100)])


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=2, max_size=6), share=st.floats(0, 1), seed=st.integers(0, 9))
def test_every_beginning_has_the_classes_in_their_proportions(counts: list[int], share: float, seed: int) -> None:
    labels = torch.cat([torch.full((count,), k) for k, count in enumerate(counts, -1)])  # the first have none
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    order = spread_classes(labels)
    assert sorted(order.tolist()) == (labels >= 0).nonzero()[:, 0].tolist()
    beginning = round(share * len(order))
    for label in range(len(counts) - 1):
        expected = counts[label + 1] * beginning / max(len(order), 1)
        assert abs(int((labels[order[:beginning]] == label).sum()) - expected) <= 1


def test_images_without_a_label_are_neither_learned_from_nor_scored() -> None:
    train, val = digits_at(TRAIN), digits_at(VAL)
    train.labels[:700] = -1
    val.labels[::2] = -1
    found = images_of(train, val)(LabelledChoice(), "evaluators.knn")
    assert (found.bank.facts.samples, found.queries.facts.samples) == (737, 180)
    assert (labels_of(found.bank) >= 0).all()
    assert sorted(labels_of(found.queries).tolist()) == sorted(val.labels[1::2].tolist())


def test_a_smaller_set_is_part_of_a_larger_one_and_each_is_opened_once() -> None:
    images = images_of(digits_at(TRAIN), digits_at(VAL))
    small = LabelledChoice(bank_images=100, query_images=50)
    found, whole = images(small, "evaluators.knn"), images(LabelledChoice(), "evaluators.knn")
    assert images(small, "evaluators.linear") is found
    assert labels_of(found.bank).tolist() == labels_of(whole.bank)[:100].tolist()
    assert labels_of(found.queries).tolist() == labels_of(whole.queries)[:50].tolist()
    assert torch.bincount(labels_of(found.bank)).tolist() == pytest.approx([10] * 10, abs=1)


def test_a_set_of_its_own_takes_its_split_or_a_share(tmp_path: Path) -> None:
    own = images_of(digits_at(TRAIN), None)
    shared = own(LabelledChoice(path="digits", holdout=0.25), "evaluators.knn")
    assert (shared.bank.facts.samples, shared.queries.facts.samples) == (1347, 450)
    names = [
        f"{part}/{kind}/{n}.png" for part, count in (("train", 3), ("val", 2)) for kind in "ab" for n in range(count)
    ]
    split = own(LabelledChoice(path=str(fill(tmp_path / "pictures", *names))), "evaluators.knn")
    assert (split.bank.facts.samples, split.queries.facts.samples) == (6, 4)
    assert split.bank.facts.classes == ("a", "b")


def test_each_fault_is_told_with_its_key_and_the_way_out(tmp_path: Path) -> None:
    train, val = digits_at(TRAIN), digits_at(VAL)
    without = no_labels(len(train))
    alone = fill(tmp_path / "alone", "a/1.png", "b/1.png")
    cases = [
        (
            replace(train, classes=(), labels=without),
            val,
            None,
            "the training images have no labels.*set evaluators.x.path to labelled",
        ),
        (replace(train, labels=without), val, None, "the training images have no labels"),
        (replace(train, classes=("0",)), val, None, "only one class, '0'; this score needs two"),
        (train, None, None, "there are no validation images to score; set data.holdout above 0, set evaluators.x.path"),
        (train, replace(val, classes=("0", "cat")), None, r"10 classes, .* images 2, .*\(1, 2, 3\)"),
        (train, replace(val, labels=no_labels(len(val))), None, "the validation images have no labels"),
        (train, val, "nowhere", "evaluators.x.path=nowhere: nowhere: no such file or folder"),
        (train, val, str(alone), "no class with two of them"),
    ]
    for bank, queries, path, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            images_of(bank, queries)(LabelledChoice(path=path), "evaluators.x")
        assert str(caught.value).startswith("evaluators.x")
        assert "\n" not in str(caught.value)
