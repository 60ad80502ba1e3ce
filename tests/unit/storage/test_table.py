"""Aligned columns."""

from opsin.storage.table import aligned

ROWS = [("", "train", "val"), ("cats", "1,200", "30"), ("a", "5", "1")]


def test_columns_are_aligned_as_asked() -> None:
    assert aligned(ROWS) == ["      train  val", "cats  1,200  30", "a     5      1"]
    assert aligned(ROWS, 1) == ["      train  val", "cats  1,200   30", "a         5    1"]
    assert aligned(ROWS, 0) == ["      train  val", "cats  1,200   30", "   a      5    1"]
