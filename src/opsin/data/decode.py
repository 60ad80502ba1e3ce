"""Decoding: from encoded bytes to pixels, the same with every decoder.

A JPEG with one or three components goes to torchcodec, everything else (PNG, WebP, GIF, BMP, TIFF,
AVIF, CMYK JPEG) to Pillow. Without torchcodec, Pillow decodes JPEG as well: both are libjpeg-turbo
and agree bit for bit.

Rules: grey becomes three equal channels, transparency lies over white, 16-bit samples keep their high byte,
CMYK becomes RGB, the EXIF orientation is applied, an animation shows its first frame.

Shapes: H, W of the upright image in pixels.
"""

import io
import warnings
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from opsin.data.base import UnreadableImage

MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded; Pillow's own limit."""

_JPEG_START = b"\xff\xd8\xff"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_NO_FRAME_FOLLOWS = (0xD9, 0xDA)


class JpegDecoder(NamedTuple):
    """The decoder of ordinary JPEG, and a sentence on it; None stands for Pillow."""

    decode: Callable[[bytes], Tensor] | None
    said: str


def _find_jpeg_decoder() -> JpegDecoder:
    # A torchcodec that does not fit the installed torch fails with OSError or RuntimeError.
    try:
        from torchcodec.decoders import decode_jpeg  # type: ignore[attr-defined]
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        return JpegDecoder(None, f"JPEG is decoded by Pillow, since torchcodec cannot be imported ({reason})")
    return JpegDecoder(cast("Callable[[bytes], Tensor]", decode_jpeg), "JPEG is decoded by torchcodec")


JPEG_DECODER = _find_jpeg_decoder()


def decode(data: bytes) -> Tensor:
    """Return the image as uint8 [3, H, W], upright; its memory is ordered [H, W, 3].

    Raises:
        UnreadableImage: empty, truncated, damaged, too large, or not an image.
    """
    if not data:
        raise UnreadableImage("there are no bytes")
    if data.startswith(_JPEG_START) and JPEG_DECODER.decode is not None:
        pixels, components = _jpeg_frame(data)
        _check_size(pixels)
        if components in (1, 3):
            try:
                image = JPEG_DECODER.decode(data)
            except RuntimeError as error:
                raise UnreadableImage("truncated or damaged JPEG") from error
            # An image turned by EXIF comes as a transposed view.
            return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return torch.from_numpy(_decode_with_pillow(data)).permute(2, 0, 1)  # [3, H, W]


def _jpeg_frame(data: bytes) -> tuple[int, int]:
    """Return the numbers of pixels and of colour components in the frame header of a JPEG."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            return height * width, data[at + 9]
        if marker in _JPEG_NO_FRAME_FOLLOWS:
            break
        # Any number of 0xFF bytes may stand before a marker.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4])
    raise UnreadableImage("truncated or damaged JPEG")


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                _check_size(image.width * image.height)
                return _to_rgb(_upright(image))
        except UnreadableImage:
            raise
        except Image.DecompressionBombError as error:
            raise UnreadableImage(f"more than {MAX_PIXELS:,} pixels") from error
        except UnidentifiedImageError as error:
            raise UnreadableImage(f"not an image, it starts with {data[:12]!r}") from error
        except MemoryError:
            raise
        except Exception as error:
            # On damaged bytes Pillow's plug-ins raise whatever their parsers run into:
            # OSError, SyntaxError, struct.error, IndexError, zlib.error and more.
            kind = "JPEG" if data.startswith(_JPEG_START) else "image"
            raise UnreadableImage(f"truncated or damaged {kind}") from error


def _check_size(pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise UnreadableImage(f"{pixels:,} pixels, more than {MAX_PIXELS:,}")


def _upright(image: Image.Image) -> Image.Image:
    if image.format in ("JPEG", "MPO"):
        # torchcodec obeys EXIF only; Pillow would fall back to the orientation in XMP.
        image.info.pop("xmp", None)
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels uint8 [H, W, 3] of an image in any mode."""
    if image.mode == "F":
        raise UnreadableImage("floating-point samples have no fixed range")
    if image.mode.startswith("I"):
        grey = np.array(image).astype(np.int64)  # [H, W]
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise UnreadableImage("32-bit samples have no fixed range")
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        return _over_white(np.array(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay colours with alpha [H, W, 4] over white, and round: [H, W, 3]."""
    colours, alpha = rgba[:, :, :3].astype(np.uint32), rgba[:, :, 3:].astype(np.uint32)
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
