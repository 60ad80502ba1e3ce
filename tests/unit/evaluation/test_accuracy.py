"""Accuracy agrees with scikit-learn, and looking changes nothing."""

import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from torch import Tensor, nn

from opsin.data.base import Batch, DataFacts
from opsin.errors import DataError
from opsin.evaluation.accuracy import Accuracy, AccuracyConfig, AccuracyReport, Classifier
from opsin.training.evaluator import StillData
from tests.unit.evaluation.digits import context_of


class Table:
    """Images whose pixels are the class scores that `Lookup` returns."""

    def __init__(self, scores: Tensor, labels: Tensor, classes: int | None = None) -> None:
        num_classes = classes or scores.shape[1]
        names = tuple(f"class {k}" for k in range(num_classes))
        self.facts = DataFacts(names, len(labels), 1, scores.shape[1], (0.0,), (1.0,))
        self.scores, self.labels = scores, labels

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self.labels), batch_size):
            part = torch.arange(len(self.labels))[start : start + batch_size]
            yield Batch({"image": self.scores[part][None, :, :, None, None]}, self.labels[part], part)


class Lookup(nn.Module):
    """Dropout and batch norm that must stay at rest, then the pixels themselves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm2d(channels, eps=1e-12)  # 1 + eps is 1 in float32

    def logits(self, images: Tensor) -> Tensor:
        torch.rand(3)  # a network may draw; the training after it must not notice
        scores: Tensor = self.norm(self.drop(images)).flatten(1)
        return scores


def evaluate(method: Classifier, data: StillData, **settings: object) -> AccuracyReport:
    return Accuracy(AccuracyConfig.model_validate(settings), context_of(data)).report(method)


def scored(data: Table, batch_size: int = 7) -> AccuracyReport:
    return evaluate(Lookup(data.scores.shape[1]), data, batch_size=batch_size)


def random_table(classes: int, images: int = 60) -> Table:
    generator = torch.Generator().manual_seed(3)
    return Table(
        torch.randn(images, classes, generator=generator), torch.randint(classes, (images,), generator=generator)
    )


def test_scores_equal_those_of_scikit_learn() -> None:
    data = random_table(classes=8)
    report = scored(data)
    scores, labels, known = data.scores.double().numpy(), data.labels.numpy(), np.arange(8)
    assert report.images == 60
    assert report.values["top1"] == top_k_accuracy_score(labels, scores, k=1, labels=known)
    assert report.values["top5"] == top_k_accuracy_score(labels, scores, k=5, labels=known)
    # float32 logits, 60 summands: relative error below 1e-6.
    expected = log_loss(labels, data.scores.double().softmax(1).numpy(), labels=known)
    assert report.values["loss"] == pytest.approx(expected, rel=1e-6)
    table = confusion_matrix(labels, scores.argmax(1), labels=known)
    assert report.confusion.tolist() == table.tolist()
    assert list(report.per_class.values()) == pytest.approx(list(table.diagonal() / table.sum(1)))


def test_the_batch_size_does_not_change_the_counts() -> None:
    data = random_table(classes=8)
    one, other = scored(data, batch_size=1), scored(data, batch_size=60)
    assert torch.equal(one.confusion, other.confusion)
    assert one.values["top5"] == other.values["top5"]


def test_top5_is_left_out_where_every_guess_would_be_right() -> None:
    assert set(scored(random_table(classes=5)).values) == {"top1", "loss"}


def test_images_without_a_label_do_not_count() -> None:
    scores = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    report = scored(Table(scores, torch.tensor([0, -1, 0])))
    assert report.images == 2
    assert report.values["top1"] == 0.5
    assert report.confusion.tolist() == [[1, 1], [0, 0]]


def test_equal_scores_are_no_right_answer() -> None:
    labels = torch.arange(6)
    assert scored(Table(torch.zeros(6, 6), labels)).values["top1"] == 1 / 6


def test_modes_weights_and_random_numbers_stay_as_they_were() -> None:
    data = random_table(classes=8)
    method = Lookup(8)
    method.norm.eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    evaluate(method, data)
    assert torch.equal(torch.rand(4), expected)
    assert method.training
    assert method.drop.training
    assert not method.norm.training
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_modes_come_back_after_a_fault() -> None:
    method = Lookup(3)
    with pytest.raises(DataError, match="distinguishes 3 classes, the data has 4"):
        evaluate(method, Table(torch.zeros(2, 3), torch.tensor([0, 1]), classes=4))
    assert method.training


def test_data_without_labels_is_a_fault() -> None:
    with pytest.raises(DataError, match="no labels"):
        scored(Table(torch.zeros(2, 3), torch.tensor([-1, -1])))


def test_the_saved_confusion_is_plain_json() -> None:
    report = scored(Table(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 0])))
    assert math.isnan(report.per_class["class 1"])
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False)) == {
        "top1": 1.0,
        "loss": pytest.approx(math.log1p(math.exp(-9)), rel=1e-3),  # a float32 next to 1, less 1
        "classes": ["class 0", "class 1"],
        "images": 2,
        "per_class": {"class 0": 1.0, "class 1": None},
        "confusion": [[2, 0], [0, 0]],
    }


def test_lines_name_the_worst_class_and_the_most_frequent_confusion() -> None:
    confusion = torch.tensor([[8, 2, 0], [0, 5, 0], [1, 0, 9]])
    report = AccuracyReport({"top1": 22 / 25, "loss": 0.5}, confusion, ("cat", "dog", "horse"), 25)
    assert report.lines() == [
        "top-1 88.00%  loss 0.5000  (25 images)",
        "",
        "least accurate classes",
        "  cat     80.00% of 10",
        "  horse   90.00% of 10",
        "",
        "most frequent confusions",
        "  cat    taken for dog  2 times",
        "  horse  taken for cat  1 times",
    ]


class FirstPixel(nn.Module):
    """The top left pixel of each channel as class scores: it tells which way an image was shifted or mirrored."""

    def logits(self, images: Tensor) -> Tensor:
        return images[:, :, 0, 0]


@pytest.mark.parametrize("views", [1, 2, 6])
def test_views_average_probabilities(views: int) -> None:
    images = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0])

    class Images(Table):
        def batches(self, batch_size: int) -> Iterator[Batch]:
            yield Batch({"image": images[None]}, labels, torch.arange(5))

    # Where the top left pixel comes from: the image and its mirror image; a border that reflects gives pixel (1, 1) to
    # one shifted down and right, as to one shifted up and left.
    places = {1: [(0, 0)], 2: [(0, 0), (0, 3)], 6: [(0, 0), (0, 3), (1, 1), (1, 2), (1, 1), (1, 2)]}[views]
    expected = torch.stack([images[:, :, row, column].softmax(1) for row, column in places]).mean(0)
    report = evaluate(FirstPixel(), Images(torch.zeros(5, 3), labels), views=views)
    # Scores are compared in float32.
    assert report.values["loss"] == pytest.approx(log_loss(labels, expected.numpy(), labels=[0, 1, 2]), rel=1e-6)
    assert report.values["top1"] == (expected.argmax(1) == labels).double().mean()
