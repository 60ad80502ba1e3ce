"""Class names become class numbers."""

import pytest

from opsin.data.sources.labels import find_classes, index_labels
from opsin.errors import DataError


def test_classes_are_sorted_and_distinct() -> None:
    assert find_classes(["dog", "cat", None, "dog", "ant"]) == ("ant", "cat", "dog")


def test_whole_numbers_are_sorted_as_numbers() -> None:
    assert find_classes(["10", "9", "0"]) == ("0", "9", "10")
    assert find_classes(["10", "9", "x"]) == ("10", "9", "x")


def test_no_name_means_unlabelled() -> None:
    assert index_labels(["b", None, "a"], ("a", "b"), "list").tolist() == [1, -1, 0]


def test_a_class_without_training_images_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"val: validation images of classes without training images \('x', 'y'; 2 in all\)"
    ):
        index_labels(["a", "y", "x", "x"], ("a",), "val")
