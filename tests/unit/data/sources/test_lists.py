"""CSV and TSV lists."""

from pathlib import Path

import pytest
import torch

from opsin.data.sources.lists import open_list
from opsin.errors import DataError
from tests.unit.data.pictures import fill


def write(tmp_path: Path, text: str, name: str = "list.csv") -> Path:
    fill(tmp_path, "a.png", "sub/b.png", "c.png")
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_paths_are_relative_to_the_list(tmp_path: Path) -> None:
    path = write(tmp_path, f"path,label\nsub/b.png,dog\n{tmp_path}/a.png,cat\nc.png,\n")
    opened = open_list(path)
    assert opened.train.classes == ("cat", "dog")
    assert opened.train.labels.tolist() == [1, 0, -1]
    assert [opened.train.location(index) for index in (0, 1)] == [str(tmp_path / "sub/b.png"), str(tmp_path / "a.png")]
    assert opened.train.read(1).shape == (3, 12, 10)
    assert opened.said == f"found 2 classes in {path}: 3 training images, no validation images"


def test_tabs_byte_order_mark_and_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffid\tfile\tkind\n7\ta.png\tx, y\n", "list.tsv")
    opened = open_list(path, image_column="file", label_column="kind")
    assert opened.train.classes == ("x, y",)


def test_the_split_column(tmp_path: Path) -> None:
    path = write(tmp_path, "path,label,split\na.png,1,train\nsub/b.png,1,test\nc.png,1,VAL\n")
    opened = open_list(path)
    assert opened.val is not None
    assert opened.val.location(0) == str(tmp_path / "c.png")
    assert opened.said.endswith("1 training image, 1 validation image; not used: split test")


def test_without_labels(tmp_path: Path) -> None:
    opened = open_list(write(tmp_path, "path\na.png\nc.png\n"), "none")
    assert torch.equal(opened.train.labels, torch.tensor([-1, -1]))
    assert opened.train.classes == ()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no column 'path' in the first line, which has nothing"),
        ("file,label\na.png,x\n", "no column 'path' in the first line, which has file, label.*data.image_column"),
        ("path,class\na.png,x\n", "no column 'label' .*set data.label_column, or data.labels=none"),
        ("path,label\n", "no training images"),
        ("path,label,split\na.png,x,val\n", "no training images"),
        ("path,label,split\na.png,x,training\n", r"list.csv:2: split 'training' is unknown; it is one of train, val"),
        ("path,label,split\na.png,x\n", r"list.csv:2: split None is unknown"),
        ("path,label\na.png,x\n,y\n", "list.csv:3: column path is empty"),
        ("path,label\n1,x\n2,x\n3,x\n4,x\na.png,x\n", r"4 of 5 files do not exist \(1, 2, 3, \.\.\.\)"),
        ("path,label,split\na.png,x,train\nc.png,y,val\n", r"classes without training images \('y'; 1 in all\)"),
    ],
)
def test_faults_name_the_line_and_the_way_out(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        open_list(write(tmp_path, text))


def test_two_missing_columns_are_two_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_list(write(tmp_path, "a,b\n1,2\n"))
    assert len(caught.value.faults) == 2


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes(b"path,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match="UTF-8"):
        open_list(path)
