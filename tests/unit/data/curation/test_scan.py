"""What one look at all images finds, compared with Pillow and numpy on whole arrays."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from opsin.data.curation.collection import open_collection
from opsin.data.curation.scan import scan
from opsin.errors import DataError
from opsin.storage.teller import Silence
from tests.unit.data.curation.scenes import classes, fill, looked_at, scene


def test_mean_and_std_weigh_every_image_the_same(tmp_path: Path) -> None:
    sizes = [(20, 30), (50, 12), (64, 64), (100, 90)]
    for seed, (width, height) in enumerate(sizes):
        scene(seed, width=width, height=height).save(tmp_path / f"{seed}.png")
    _, found, _ = looked_at(tmp_path)
    images = [np.asarray(scene(i, width=w, height=h), dtype=np.float64) / 255 for i, (w, h) in enumerate(sizes)]
    mean = np.mean([image.mean(axis=(0, 1)) for image in images], axis=0)
    square = np.mean([(image**2).mean(axis=(0, 1)) for image in images], axis=0)
    # Sums of integers against sums of floats: rounding of float64 only.
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.std == pytest.approx(np.sqrt(square - mean**2), rel=1e-10)
    assert found.sizes.tolist() == [[height, width] for width, height in sizes]
    assert found.readable.all()


def test_large_images_are_summed_in_pieces(tmp_path: Path) -> None:
    # More pixels than one piece holds.
    pixels = np.random.default_rng(0).integers(0, 256, (1100, 1000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.bmp")
    _, found, _ = looked_at(tmp_path)
    scaled = pixels.reshape(-1, 3) / 255
    assert found.mean == pytest.approx(scaled.mean(axis=0), rel=1e-10)
    assert found.std == pytest.approx(scaled.std(axis=0), rel=1e-10)


def test_kinds_of_images_are_counted(tmp_path: Path) -> None:
    image = scene(0)
    image.save(tmp_path / "colour.png")
    image.save(tmp_path / "photo.jpg")
    image.convert("L").save(tmp_path / "grey.jpg")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.convert("CMYK").save(tmp_path / "print.jpg")
    deep = np.asarray(image.convert("L")).astype(np.uint16) << 8
    Image.fromarray(deep).save(tmp_path / "deep.png")
    _, found, _ = looked_at(tmp_path)
    assert found.formats == {"PNG": 3, "JPEG": 3}
    assert found.modes == {"RGB": 2, "L": 1, "RGBA": 1, "CMYK": 1, "I;16": 1}
    assert (found.num_grey, found.num_alpha, found.num_16_bit) == (2, 1, 1)


def test_unreadable_images_are_listed_with_their_reason(tmp_path: Path) -> None:
    folder = classes(tmp_path, a=70, b=70)  # several chunks
    (folder / "a" / "text.jpg").write_text("a thousand words")
    (folder / "b" / "empty.png").write_bytes(b"")
    collection, found, _ = looked_at(folder)
    assert [(failure.location, failure.reason[:20]) for failure in found.unreadable] == [
        (f"{folder}/a/text.jpg", "not an image, it sta"),
        (f"{folder}/b/empty.png", "there are no bytes"),
    ]
    assert found.num_readable == 140
    assert [collection.location(i) for i in np.flatnonzero(~found.readable).tolist()] == [
        f.location for f in found.unreadable
    ]


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_text("no image")
    with pytest.raises(DataError, match=r"none of its 2 images can be read \(.*1.png: not an image.*check the path"):
        looked_at(tmp_path)


def test_rows_of_parquet_are_images_like_files(tmp_path: Path) -> None:
    rows = []
    for seed in range(5):
        file = io.BytesIO()
        scene(seed).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": ["x", "y", "x", "y", "x"]}), tmp_path / "t.parquet")
    fill(tmp_path / "files", *(f"{seed}.png" for seed in range(5)))
    table = scan(open_collection(str(tmp_path / "t.parquet")), Silence())
    files = scan(open_collection(str(tmp_path / "files")), Silence())
    assert table.exact.tolist() == files.exact.tolist()
    assert table.perceptual.tolist() == files.perceptual.tolist()
    assert (table.mean, table.std, table.formats) == (files.mean, files.std, files.formats)


def test_all_splits_of_a_folder_are_one_collection(tmp_path: Path) -> None:
    fill(tmp_path / "train", "a/1.png", "b/1.png")
    fill(tmp_path / "val", "b/2.png", first_seed=5)
    fill(tmp_path / "test", "b/3.png", "c/3.png", first_seed=7)
    collection = open_collection(str(tmp_path))
    assert collection.splits == ("train", "validation", "test")
    assert [collection.class_name(label) for label in collection.labels.tolist()] == ["a", "b", "b", "b", "c"]
    assert collection.split_numbers.tolist() == [0, 0, 1, 2, 2]
    assert collection.location(4) == f"{tmp_path}/test/c/3.png"
    assert (collection.read(4).permute(1, 2, 0).numpy() == np.asarray(scene(8))).all()
