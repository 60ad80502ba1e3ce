"""Folders: which folder name is a class, which a split, and what is said about it."""

import errno
import os
from pathlib import Path

import pytest

from opsin.data.base import UnreadableImage
from opsin.data.sources.files import find_images
from opsin.data.sources.folder import open_folder
from opsin.errors import DataError, TransientError
from tests.unit.data.pictures import fill


def test_class_folders(tmp_path: Path) -> None:
    opened = open_folder(fill(tmp_path, "dog/1.png", "cat/2.png", "cat/1.PNG", "cat/notes.txt", "cat/.hidden.png"))
    assert opened.train.classes == ("cat", "dog")
    assert [opened.train.location(index) for index in range(3)] == [
        str(tmp_path / name) for name in ("cat/1.PNG", "cat/2.png", "dog/1.png")
    ]
    assert opened.train.labels.tolist() == [0, 0, 1]
    assert opened.train.read(0).shape == (3, 12, 10)
    assert opened.val is None
    assert opened.said == f"found 2 class folders in {tmp_path}: 3 training images, no validation images"


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val"])
def test_split_folders(tmp_path: Path, name: str) -> None:
    opened = open_folder(fill(tmp_path, "train/a/1.png", "train/b/2.png", "train/b/3.png", f"{name}/b/1.png"))
    assert opened.val is not None
    assert opened.train.labels.tolist() == [0, 1, 1]
    assert opened.val.labels.tolist() == [1]
    assert opened.val.classes == opened.train.classes
    assert opened.said == f"found 2 class folders in {tmp_path}: 3 training images, 1 validation image"


def test_val_comes_before_test_and_what_is_left_is_said(tmp_path: Path) -> None:
    opened = open_folder(fill(tmp_path, "train/a/1.png", "val/a/1.png", "test/a/1.png", "cover.png"))
    assert opened.val is not None
    assert opened.val.location(0) == str(tmp_path / "val/a/1.png")
    assert opened.said.endswith(f"; not used: test, images directly in {tmp_path}")


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    opened = open_folder(fill(tmp_path, "1.png", "2.png"))
    assert opened.train.classes == ()
    assert opened.train.labels.tolist() == [-1, -1]
    assert opened.said == f"found images without labels in {tmp_path}: 2 training images, no validation images"


def test_flat_splits_are_unlabelled(tmp_path: Path) -> None:
    opened = open_folder(fill(tmp_path, "train/1.png", "val/a/2.png"))
    assert opened.val is not None
    assert opened.train.labels.tolist() == opened.val.labels.tolist() == [-1]


def test_deeper_or_mixed_folders_are_unlabelled_and_it_is_said(tmp_path: Path) -> None:
    opened = open_folder(fill(tmp_path, "2023/may/1.png", "2024/2.png"))
    assert opened.train.labels.tolist() == [-1, -1]
    assert "1 of 2 images are not exactly one folder deep" in opened.said
    assert "data.labels=folders" in opened.said


def test_the_labels_switch_overrides_what_is_found(tmp_path: Path) -> None:
    fill(tmp_path, "a/x/1.png", "a/2.png", "b/y/z/3.png")
    assert open_folder(tmp_path, "folders").train.labels.tolist() == [0, 0, 1]
    fill(tmp_path / "classes", "a/1.png", "b/1.png")
    assert open_folder(tmp_path / "classes", "none").train.classes == ()


def test_images_outside_of_class_folders_are_refused_on_request(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "1.png", "2.png", "3.png", "4.png")
    with pytest.raises(DataError, match=r"4 of 5 images are not in a class folder \(.*/1\.png, .*/3\.png, \.\.\.\)"):
        open_folder(tmp_path, "folders")


def test_one_class_is_reported(tmp_path: Path) -> None:
    assert open_folder(fill(tmp_path, "only/1.png")).train.classes == ("only",)


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    assert open_folder(fill(tmp_path, "train/1.png", "truck/1.png")).train.classes == ("train", "truck")


def test_splits_between_classes_are_unclear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train and test stand beside truck"):
        open_folder(fill(tmp_path, "train/1.png", "test/1.png", "truck/1.png"))


def test_a_folder_without_images_beside_the_splits_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    assert open_folder(fill(tmp_path, "train/a/1.png", "val/a/1.png")).val is not None


@pytest.mark.parametrize("name", ["", "a", "train"])
def test_an_empty_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"no images in this folder.*\.jpg"):
        open_folder(tmp_path)


def test_a_class_that_only_validates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"classes without training images \('new'; 1 in all\)"):
        open_folder(fill(tmp_path, "train/a/1.png", "val/a/1.png", "val/new/1.png"))


def test_validation_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test: no class folders.*data\.path=.*train"):
        open_folder(fill(tmp_path, "train/a/1.png", "test/1.png"))


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "1.png")
    fill(tmp_path / "images", "a/1.png")
    (tmp_path / "images" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "a" / "up").symlink_to(tmp_path / "images")
    assert sorted(find_images(tmp_path / "images")) == ["a/1.png", "b/1.png"]


def test_files_that_are_no_images_are_unreadable_one_by_one(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png")
    (tmp_path / "a" / "2.jpg").write_text("a note")
    (tmp_path / "a" / "3.jpg").symlink_to(tmp_path / "gone.jpg")
    source = open_folder(tmp_path).train
    assert source.read(0).shape == (3, 12, 10)
    with pytest.raises(UnreadableImage, match="not an image"):
        source.read(1)
    with pytest.raises(UnreadableImage, match=r"the file cannot be read \(No such file or directory\)"):
        source.read(2)


@pytest.mark.parametrize(("number", "passes"), [(errno.ESTALE, True), (errno.EMFILE, True), (errno.EIO, False)])
def test_what_the_network_or_the_machine_does_is_not_blamed_on_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    fill(tmp_path, "a/1.png", "b/2.png")
    source = open_folder(tmp_path).train

    def fail(path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(TransientError if passes else UnreadableImage) as caught:
        source.read(0)
    if passes:
        assert str(caught.value).startswith(f"{tmp_path}/a/1.png: cannot be read: {os.strerror(number)}; the image is")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    (fill(tmp_path, "a/1.png") / "a/1.png").chmod(0)
    with pytest.raises(UnreadableImage, match="Permission denied"):
        open_folder(tmp_path).train.read(0)


def test_names_in_any_script_and_encoding(tmp_path: Path) -> None:
    fill(tmp_path, "ä/1.png")
    os.rename(tmp_path / "ä" / "1.png", os.fsencode(tmp_path) + b"/\xc3\xa4/\xff.png")
    source = open_folder(tmp_path).train
    assert source.classes == ("ä",)
    assert source.read(0).shape == (3, 12, 10)
