"""Every kind of image becomes the same upright RGB, whichever decoder is installed; damage is found."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from opsin.data import decode as decode_module
from opsin.data.base import UnreadableImage
from opsin.data.decode import JpegDecoder, decode
from tests.unit.data.pictures import encoded, pixels

RGB = Image.fromarray(pixels(37, 53))


@pytest.fixture(params=["torchcodec", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(decode_module, "JPEG_DECODER", JpegDecoder(None, ""))
    return str(request.param)


def as_image(array: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def jpegs() -> dict[str, bytes]:
    orientations = {}
    for value in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = value
        orientations[f"exif {value}"] = encoded(RGB, "JPEG", exif=exif)
    return {
        "baseline": encoded(RGB, "JPEG", quality=75),
        "no subsampling": encoded(RGB, "JPEG", quality=95, subsampling=0),
        "progressive": encoded(RGB, "JPEG", progressive=True),
        "grey": encoded(RGB.convert("L"), "JPEG"),
        "one pixel": encoded(RGB.resize((1, 1)), "JPEG"),
        "trailing bytes": encoded(RGB, "JPEG") + bytes(40),
        **orientations,
    }


@pytest.mark.parametrize("name", jpegs())
def test_torchcodec_and_pillow_agree_on_every_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpegs()[name]
    with_torchcodec = decode(data)
    monkeypatch.setattr(decode_module, "JPEG_DECODER", JpegDecoder(None, ""))
    with_pillow = decode(data)
    assert torch.equal(with_torchcodec, with_pillow)
    # One layout, since resizing takes a different path for each.
    assert with_torchcodec.permute(1, 2, 0).is_contiguous()
    assert with_pillow.permute(1, 2, 0).is_contiguous()


def test_png_keeps_every_pixel() -> None:
    assert torch.equal(decode(encoded(RGB)), as_image(np.array(RGB)))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = Image.fromarray(pixels(16, 24))
    data = encoded(turned, file_format, exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    image = decode(data)
    assert image.shape == ((3, 16, 24) if orientation <= 4 else (3, 24, 16))
    assert torch.equal(image, as_image(np.array(upright)))


def test_grey_becomes_three_equal_channels(decoder: str) -> None:
    for file_format in ("PNG", "JPEG"):
        image = decode(encoded(RGB.convert("L"), file_format))
        assert image.shape == (3, 37, 53)
        assert torch.equal(image[0], image[1])
        assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(mode: str) -> None:
    channels = pixels(9, 7, 4 if mode == "RGBA" else 2)
    channels[0, 0, -1], channels[0, 1, -1] = 0, 255
    image = decode(encoded(Image.fromarray(channels, mode)))
    colours = channels[:, :, :-1].astype(float)
    alpha = channels[:, :, -1:] / 255
    expected = np.floor(colours * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)
    assert torch.equal(image, as_image(np.broadcast_to(expected, (9, 7, 3))))
    assert image[:, 0, 0].tolist() == [255, 255, 255]


def test_transparent_palette_colour_is_white() -> None:
    palette = RGB.convert("P")
    index = np.array(palette)[5, 5]
    image = decode(encoded(palette, transparency=int(index)))
    assert image[:, 5, 5].tolist() == [255, 255, 255]
    assert torch.equal(decode(encoded(palette)), as_image(np.array(palette.convert("RGB"))))


def test_16_bit_samples_keep_their_high_byte() -> None:
    values = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 109
    image = decode(encoded(Image.fromarray(values)))
    assert torch.equal(image, as_image(np.repeat((values // 256).astype(np.uint8)[:, :, None], 3, axis=2)))
    assert torch.equal(image, decode(encoded(Image.fromarray(values), "TIFF")))
    colours = np.stack([values, values + 77, 65535 - values], axis=-1)
    assert torch.equal(decode(rgb16_png(colours)), as_image((colours // 256).astype(np.uint8)))


def rgb16_png(colours: NDArray[np.uint16], claimed_side: int | None = None) -> bytes:
    """A PNG with 16 bits per colour, which Pillow cannot write; its header may lie about the size."""
    height, width = (claimed_side, claimed_side) if claimed_side else colours.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_cmyk_becomes_rgb_also_where_adobe_inverts_it() -> None:
    cmyk = RGB.convert("CMYK")
    adobe = encoded(cmyk, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in adobe
    expected = as_image(np.array(RGB)).int()
    # JPEG of quality 100 changes a sample by a few levels.
    assert (decode(adobe).int() - expected).abs().max() <= 4
    assert torch.equal(decode(encoded(cmyk, "TIFF")), as_image(np.array(cmyk.convert("RGB"))))


def test_animation_shows_its_first_frame() -> None:
    frames = [Image.fromarray(pixels(8, 8, seed=seed)).quantize() for seed in range(3)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert torch.equal(decode(gif), as_image(np.array(frames[0].convert("RGB"))))
    colours = [frame.convert("RGB") for frame in frames]
    webp = encoded(colours[0], "WEBP", save_all=True, append_images=colours[1:], lossless=True)
    assert torch.equal(decode(webp), as_image(np.array(colours[0])))


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
@pytest.mark.parametrize("options", [{"progressive": False}, {"progressive": True}])
def test_truncated_jpeg_is_unreadable(share: float, options: dict[str, bool], decoder: str) -> None:
    data = encoded(Image.fromarray(pixels(120, 160)), "JPEG", quality=90, **options)
    with pytest.raises(UnreadableImage, match="truncated or damaged JPEG"):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_other_truncated_files_are_unreadable(file_format: str) -> None:
    data = encoded(Image.fromarray(pixels(60, 80)), file_format)
    for share in (0.3, 0.9):
        with pytest.raises(UnreadableImage):
            decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "there are no bytes"),
        (b"Just a note about the picture.", "not an image, it starts with b'Just a note '"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "JPEG"),
        (b"\xff\xd8\xff\xd9" + bytes(40), "JPEG"),
        (b"\xff\xd8" + b"\xff" * 40, "JPEG"),
    ],
)
def test_what_is_no_image_is_unreadable(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=re.escape(reason)):
        decode(data)


def test_every_cut_of_a_jpeg_header_is_unreadable(decoder: str) -> None:
    data = encoded(RGB, "JPEG")
    for length in range(data.index(b"\xff\xda")):
        with pytest.raises(UnreadableImage):
            decode(data[:length])


def test_an_image_that_claims_to_be_huge_is_refused_before_decoding(decoder: str) -> None:
    data = bytearray(encoded(RGB, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 40_000, 40_000)
    with pytest.raises(UnreadableImage, match="pixels"):
        decode(bytes(data))
    with pytest.raises(UnreadableImage, match="pixels"):
        decode(rgb16_png(np.zeros((1, 1, 3), np.uint16), claimed_side=30_000))


def test_samples_without_a_range_are_unreadable() -> None:
    with pytest.raises(UnreadableImage, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(UnreadableImage, match="32-bit"):
        decode(encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"))


def test_no_warning_leaks() -> None:
    palette = RGB.convert("P")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(encoded(palette, transparency=bytes(range(256))))
        decode(encoded(RGB, "JPEG"))
    assert caught == []
