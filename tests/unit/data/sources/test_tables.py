"""Parquet files in the layout of the hub."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from opsin.data.base import UnreadableImage
from opsin.data.decode import decode
from opsin.data.sources.stores import InMemory, Unpacked
from opsin.data.sources.tables import open_tables
from opsin.errors import DataError
from tests.unit.data.pictures import png


def hub(columns: dict[str, Any], features: dict[str, Any] | None = None) -> pa.Table:
    table = pa.table(columns)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    return table.replace_schema_metadata(metadata)


def images(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": png(seed), "path": f"{seed}.png"} for seed in range(first, first + count)]


NAMED = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


def write(path: Path, table: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


@pytest.mark.parametrize("in_memory_bytes", [1 << 20, 0])
def test_images_labels_and_names(tmp_path: Path, in_memory_bytes: int) -> None:
    folder = tmp_path / "set"
    write(folder / "data/train-00000-of-00002.parquet", hub({"img": images(5), "label": [0, 1, -1, None, 1]}, NAMED))
    write(folder / "data/train-00001-of-00002.parquet", hub({"img": images(3, 5), "label": [1, 0, 0]}, NAMED))
    write(folder / "data/test-00000-of-00001.parquet", hub({"img": images(2, 8), "label": [1, 1]}, NAMED))
    opened = open_tables(folder, cache=tmp_path / "cache", in_memory_bytes=in_memory_bytes)
    assert opened.train.classes == ("cat", "dog")
    assert opened.train.labels.tolist() == [0, 1, -1, -1, 1, 1, 0, 0]
    assert opened.train.labels.dtype == torch.int64
    assert opened.val is not None
    assert opened.val.labels.tolist() == [1, 1]
    for index in (7, 0, 4, 5):
        assert torch.equal(opened.train.read(index), decode(png(index)))
    assert torch.equal(opened.val.read(1), decode(png(9)))
    assert opened.train.location(6) == f"{folder}/data/train-00001-of-00002.parquet row 1"
    assert opened.said.startswith(f"found 2 classes in the parquet files of {folder}: 8 training images, 2 validation")


def test_small_tables_stay_in_memory_and_large_ones_are_unpacked_once(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", hub({"image": [png(0), png(1), None]}))
    small = open_tables(path, cache=tmp_path / "cache").train
    assert isinstance(small.store, InMemory)  # type: ignore[attr-defined]
    assert not (tmp_path / "cache").exists()
    large = open_tables(path, cache=tmp_path / "cache", in_memory_bytes=0)
    store = large.train.store  # type: ignore[attr-defined]
    assert isinstance(store, Unpacked)
    assert "unpacked into" in large.said
    assert store.images.read_bytes() == png(0) + png(1)
    written = store.images.stat().st_mtime_ns
    open_tables(path, cache=tmp_path / "cache", in_memory_bytes=0)
    assert store.images.stat().st_mtime_ns == written
    for source in (small, large.train):
        with pytest.raises(UnreadableImage, match="no image bytes"):
            source.read(2)


@pytest.mark.parametrize("in_memory_bytes", [1 << 20, 0])
def test_a_pickle_carries_no_images(tmp_path: Path, in_memory_bytes: int) -> None:
    path = write(tmp_path / "train.parquet", hub({"img": images(40), "label": [0] * 40}, NAMED))
    source = open_tables(path, cache=tmp_path / "cache", in_memory_bytes=in_memory_bytes).train
    expected = source.read(39)
    pickled = pickle.dumps(source)
    assert len(pickled) < 40 * len(png(0)) / 4
    assert torch.equal(pickle.loads(pickled).read(39), expected)


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (["b", "a", None, ""], ("a", "b"), [1, 0, -1, -1]),
        ([10, 9, 9, None], ("9", "10"), [1, 0, 0, -1]),
        (pa.array(["b", "a", "a", None]).dictionary_encode(), ("a", "b"), [1, 0, 0, -1]),
    ],
)
def test_labels_of_any_kind(tmp_path: Path, labels: Any, classes: tuple[str, ...], numbers: list[int]) -> None:
    path = write(tmp_path / "x.parquet", hub({"image": [png(0)] * 4, "target": labels}))
    source = open_tables(path, cache=tmp_path).train
    assert source.classes == classes
    assert source.labels.tolist() == numbers


def test_without_a_label_column_images_are_unlabelled_and_it_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", hub({"image": [png(0)] * 2, "caption": ["a", "b"]}))
    opened = open_tables(path, cache=tmp_path)
    assert opened.train.labels.tolist() == [-1, -1]
    assert opened.said.endswith("no label column among caption, set data.label_column to use one")
    assert open_tables(path, label_column="caption", cache=tmp_path).train.classes == ("a", "b")
    assert "label column" not in open_tables(path, "none", cache=tmp_path).said


def test_validation_is_preferred_and_the_rest_is_said(tmp_path: Path) -> None:
    for name in ("train", "test", "validation", "extra"):
        write(tmp_path / f"{name}.parquet", hub({"img": images(1), "label": [0]}, NAMED))
    opened = open_tables(tmp_path, cache=tmp_path)
    assert opened.val is not None
    assert "validation.parquet" in opened.val.location(0)
    assert opened.said.endswith("not used: files without a split in their name, test")


def test_files_without_a_split_all_train(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", hub({"img": images(2), "label": [0, 1]}, NAMED))
    opened = open_tables(tmp_path, cache=tmp_path)
    assert (len(opened.train), opened.val) == (4, None)


BOTH = {"img": images(1), "mask": [png(0)], "fine_label": [0], "coarse_label": ["x"], "score": [0.5]}
TWO_LABELS = {name: {"_type": "ClassLabel", "names": ["a"]} for name in ("fine_label", "coarse_label")}


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ({}, "columns img, mask may all hold the images; set data.image_column=img or mask"),
        (
            {"image_column": "img"},
            "columns fine_label, coarse_label may all hold the labels; set data.label_column=fine",
        ),
        ({"image_column": "picture"}, "no column 'picture'; set data.image_column to one of img, mask"),
        ({"image_column": "score"}, "column 'score' is double; data.image_column needs bytes"),
        ({"image_column": "img", "label_column": "kind"}, "no column 'kind'; set data.label_column to one of img"),
        ({"image_column": "img", "label_column": "score"}, "label column 'score' is double; labels are whole numbers"),
    ],
)
def test_unclear_columns_name_the_key_to_set(tmp_path: Path, asked: dict[str, str], fault: str) -> None:
    path = write(tmp_path / "x.parquet", hub(BOTH, TWO_LABELS))
    with pytest.raises(DataError, match=fault):
        open_tables(path, cache=tmp_path, **asked)  # type: ignore[arg-type]


def test_unclear_columns_can_be_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", hub(BOTH, TWO_LABELS))
    opened = open_tables(path, image_column="mask", label_column="coarse_label", cache=tmp_path)
    assert opened.train.classes == ("x",)
    assert torch.equal(opened.train.read(0), decode(png(0)))


def test_faults_of_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.parquet files"):
        open_tables(tmp_path, cache=tmp_path)
    path = write(tmp_path / "test.parquet", hub({"img": images(1), "label": [0]}, NAMED))
    with pytest.raises(DataError, match="only files of split test"):
        open_tables(tmp_path, cache=tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"test\.parquet: cannot be read as parquet"):
        open_tables(path, cache=tmp_path)
    with pytest.raises(DataError, match="no column of images among a"):
        open_tables(write(path, hub({"a": [1]})), cache=tmp_path)
    with pytest.raises(DataError, match="no rows"):
        open_tables(write(path, hub({"img": pa.array([], pa.binary())})), cache=tmp_path)
    with pytest.raises(DataError, match="label 2 in column 'label', which names 2 classes"):
        open_tables(write(path, hub({"img": images(1), "label": [2]}, NAMED)), cache=tmp_path)


def test_splits_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", hub({"img": [png(0)], "label": ["a"]}))
    write(tmp_path / "test.parquet", hub({"img": [png(0)], "label": ["b"]}))
    with pytest.raises(DataError, match=r"classes without training images \('b'; 1 in all\)"):
        open_tables(tmp_path, cache=tmp_path)
    write(tmp_path / "test.parquet", hub({"img": [png(0)]}))
    with pytest.raises(DataError, match=r"test\.parquet: no label column"):
        open_tables(tmp_path, cache=tmp_path)
    write(tmp_path / "train-2.parquet", hub({"img": [png(0)], "label": [1]}))
    with pytest.raises(DataError, match=r"train\.parquet: other columns than .*train-2\.parquet"):
        open_tables(tmp_path, cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", hub({"img": images(1)}))
    with pytest.raises(DataError, match="the cache folder must be writable"):
        open_tables(path, cache=path, in_memory_bytes=0)
