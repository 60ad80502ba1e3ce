"""From a path or a word to sources, and sources in worker processes."""

import multiprocessing
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from opsin.data import decode
from opsin.data.base import Source
from opsin.data.decode import JpegDecoder
from opsin.data.sources import open as sources
from opsin.data.sources.cifar10 import FOLDER
from opsin.data.sources.kinds import KINDS
from opsin.data.sources.open import open_sources
from opsin.errors import DataError
from tests.unit.data.pictures import fill, png
from tests.unit.data.sources.test_cifar10 import batch_files

CIFAR = Path(os.environ.get("OPSIN_TEST_DATA", "../shared/data")) / "cifar10"


def everything(tmp_path: Path) -> dict[str, str]:
    """One path of each kind."""
    fill(tmp_path / "folder", "a/1.png", "b/2.png")
    (tmp_path / "list.csv").write_text("path,label\nfolder/a/1.png,a\n")
    (tmp_path / "set" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"image": [png(0)], "label": ["a"]}), tmp_path / "set" / "data" / "train.parquet")
    (tmp_path / "cifar" / FOLDER).mkdir(parents=True)
    for name, data in batch_files().items():
        (tmp_path / "cifar" / FOLDER / name).write_bytes(data)
    paths = {"folder": "folder", "csv": "list.csv", "parquet": "set", "cifar10": "cifar"}
    return {"digits": "digits", **{kind: str(tmp_path / path) for kind, path in paths.items()}}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_is_found(tmp_path: Path, kind: str) -> None:
    path = everything(tmp_path)[kind]
    opened = open_sources(path, cache=tmp_path / "cache")
    assert opened.kind == kind
    assert opened.train.read(0).dtype == torch.uint8
    assert len(opened.train.read(0)) == 3
    assert f"{len(opened.train):,} training image" in opened.said
    assert open_sources(path, kind=kind, cache=tmp_path / "cache").said == opened.said


@pytest.mark.parametrize("kind", KINDS)
def test_labels_can_be_left_out_of_every_kind(tmp_path: Path, kind: str) -> None:
    train = open_sources(everything(tmp_path)[kind], labels="none", cache=tmp_path).train
    assert train.classes == ()
    assert set(train.labels.tolist()) == {-1}


def test_files_are_known_by_their_ending(tmp_path: Path) -> None:
    everything(tmp_path)
    assert open_sources(str(tmp_path / "set/data/train.parquet"), cache=tmp_path).kind == "parquet"
    assert open_sources(str(tmp_path / "cifar" / FOLDER), cache=tmp_path).kind == "cifar10"
    with pytest.raises(DataError, match=r"not a known kind of file; .*\.csv, \.tsv, \.parquet, \.tar\.gz, \.tgz"):
        open_sources(str(tmp_path / "folder/a/1.png"), cache=tmp_path)


def test_digits() -> None:
    opened = open_sources("digits", cache=Path())
    assert len(opened.train) == 1797
    assert opened.train.classes == tuple("0123456789")
    assert opened.val is None
    image = opened.train.read(0)
    assert image.shape == (3, 8, 8)
    # The first line of the first digit, as scikit-learn documents it, has ink 0 0 5 13 9 1 0 0 of 16.
    assert image[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert int(opened.train.labels[0]) == 0


def test_the_word_cifar10_looks_into_the_cache(tmp_path: Path) -> None:
    cache = Path(everything(tmp_path)["cifar10"])
    opened = open_sources("cifar10", cache=cache)
    assert opened.said == "found CIFAR-10: 10 training images, 2 validation images"


@pytest.mark.data
@pytest.mark.skipif(not CIFAR.is_dir(), reason="needs the CIFAR-10 files of OPSIN_TEST_DATA")
def test_cifar10_in_parquet(tmp_path: Path) -> None:
    opened = open_sources(str(CIFAR), cache=tmp_path)
    assert opened.val is not None
    assert opened.said.endswith("50,000 training images, 10,000 validation images")
    assert opened.train.classes[:3] == ("airplane", "automobile", "bird")
    assert torch.bincount(opened.train.labels).tolist() == [5000] * 10
    assert torch.bincount(opened.val.labels).tolist() == [1000] * 10
    assert opened.train.read(49_999).shape == (3, 32, 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "options", "fault"),
    [
        ("gone", {}, "gone: no such file or folder; data.path is a folder of images.*relative to"),
        ("", {"kind": "zip"}, "data.kind=zip is unknown; it is auto or one of digits, cifar10, folder, csv, parquet"),
        ("list.csv", {"kind": "folder"}, "Not a directory.*data.kind"),
        ("folder", {"kind": "csv"}, "Is a directory.*data.kind"),
        ("list.csv", {"labels": "folders"}, "data.labels=folders needs a folder of images, but this is csv"),
        ("folder", {"kind": "cifar10"}, "batches.meta is missing"),
    ],
)
def test_faults(tmp_path: Path, path: str, options: dict[str, str], fault: str) -> None:
    everything(tmp_path)
    with pytest.raises(DataError, match=fault) as caught:
        open_sources(str(tmp_path / path), cache=tmp_path, **options)  # type: ignore[arg-type]
    assert all("\n" not in line for line in caught.value.faults)


def test_a_missing_torchcodec_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "JPEG_DECODER", JpegDecoder(None, "JPEG is decoded by Pillow"))
    assert open_sources("digits", cache=tmp_path).said.endswith("; JPEG is decoded by Pillow")
    assert decode.JPEG_DECODER.decode is not None


def _last(source: Source) -> Tensor:
    return source.read(len(source) - 1)


def test_sources_read_the_same_in_a_worker_process(tmp_path: Path) -> None:
    opened = [open_sources(path, cache=tmp_path).train for path in everything(tmp_path).values()]
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        for here, there in zip(map(_last, opened), pool.map(_last, opened), strict=True):
            assert torch.equal(here, there)
