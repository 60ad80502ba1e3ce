"""Hashes of images: equal for equal pixels, alike for what looks alike."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from opsin.data.curation.fingerprint import MIN_DETAIL, Fingerprint, fingerprint
from tests.unit.data.curation.scenes import scene


def of(image: Image.Image) -> Fingerprint:
    return fingerprint(np.asarray(image.convert("RGB")))


def different_bits(a: Image.Image, b: Image.Image) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(of(a).perceptual, of(b).perceptual, strict=True))


def compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """Two real photographs of 640 x 427 pixels: a temple and a flower."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def test_changed_copies_of_a_photograph_keep_their_hash(photographs: list[Image.Image]) -> None:
    for photograph in photographs:
        copies = {
            "compressed": compressed(photograph, 40),
            "halved": photograph.resize((320, 213), Image.Resampling.BICUBIC),
            "stretched": photograph.resize((500, 500), Image.Resampling.BICUBIC),
            "grey": photograph.convert("L"),
            "darker": ImageEnhance.Brightness(photograph).enhance(0.8),
        }
        distances = {name: different_bits(photograph, copy) for name, copy in copies.items()}
        assert max(distances.values()) <= 8, distances


def test_other_pictures_have_other_hashes(photographs: list[Image.Image]) -> None:
    pictures = [
        *photographs,
        *(scene(seed) for seed in range(20)),
        photographs[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ]
    distances = [different_bits(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(distances) > 24


def test_each_bit_says_which_of_two_cells_is_brighter() -> None:
    # One pixel per cell: nothing is averaged.
    cells = np.random.default_rng(0).permutation(81).reshape(9, 9).astype(np.uint8) * 3
    expected: list[list[bool]] = [[], []]
    for row in range(8):
        for column in range(8):
            expected[0].append(bool(cells[row, column + 1] > cells[row, column]))
            expected[1].append(bool(cells[row + 1, column] > cells[row, column]))
    found = fingerprint(np.repeat(cells[:, :, None], 3, axis=2))
    for word, bits in zip(found.perceptual, expected, strict=True):
        unpacked = np.unpackbits(np.frombuffer(word.to_bytes(8, "little"), dtype=np.uint8))
        assert unpacked.astype(bool).tolist() == bits
    assert found.detail == 128


def test_equal_pixels_have_one_exact_hash_and_their_shape_counts() -> None:
    pixels: NDArray[np.uint8] = np.asarray(scene(1))
    other = pixels.copy()
    other[3, 4, 0] ^= 1
    assert fingerprint(pixels).exact == fingerprint(pixels.copy()).exact
    assert fingerprint(pixels).exact != fingerprint(other).exact
    flat = np.zeros((4, 6, 3), dtype=np.uint8)
    assert fingerprint(flat).exact != fingerprint(flat.reshape(6, 4, 3)).exact
    assert 0 <= fingerprint(pixels).exact < 2**63


def test_flat_and_tiny_images_have_no_detail() -> None:
    assert of(Image.new("RGB", (50, 40), (90, 90, 90))).detail == 0
    noise = np.random.default_rng(0).integers(127, 129, (50, 50, 3), dtype=np.uint8)
    assert fingerprint(noise).detail < MIN_DETAIL
    assert of(scene(0, width=8, height=8)).detail == 0
    assert of(scene(0, width=9, height=9)).detail >= MIN_DETAIL
