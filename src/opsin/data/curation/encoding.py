"""The stored form of an image: its bytes, format and mode."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from opsin.data.base import UnreadableImage
from opsin.data.curation.collection import Collection
from opsin.data.sources.files import Files
from opsin.data.sources.tables import Table

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_BIT_DEPTH = 24


@dataclass(frozen=True, slots=True)
class Encoding:
    """`file_format` by Pillow's names (JPEG, PNG), `mode` too (RGB, L, RGBA, CMYK)."""

    file_format: str
    mode: str
    has_alpha: bool
    has_16_bits: bool


def stored_bytes(collection: Collection, index: int) -> bytes | None:
    """Return the bytes of an image file or of a row; None if the images are stored as pixels.

    Raises:
        UnreadableImage: they cannot be read.
    """
    _, source, inside = collection.locate(index)
    if isinstance(source, Table):
        return source.store.read(inside)
    if isinstance(source, Files):
        try:
            return Path(source.location(inside)).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"the file cannot be read ({error.strerror})") from error
    return None


def find_encoding(collection: Collection, index: int) -> Encoding | None:
    """Return the encoding of an image, from its first bytes; None if it is not known."""
    _, source, inside = collection.locate(index)
    if isinstance(source, Files):
        try:
            with Path(source.location(inside)).open("rb") as file:
                return _look(file)
        except OSError:
            return None
    data = stored_bytes(collection, index)
    return None if data is None else _look(io.BytesIO(data))


def _look(file: io.BufferedReader | io.BytesIO) -> Encoding | None:
    start = file.read(_PNG_BIT_DEPTH + 1)
    file.seek(0)
    try:
        # Pillow reads the header only.
        with Image.open(file) as image:
            # Pillow halves the samples of coloured PNG while it reads them, so that the mode does not show them.
            deep_png = start.startswith(_PNG_START) and start[_PNG_BIT_DEPTH] == 16
            return Encoding(
                file_format=image.format or "unknown",
                mode=image.mode,
                has_alpha=image.has_transparency_data,
                has_16_bits=deep_png or image.mode.startswith("I"),
            )
    except UnidentifiedImageError:  # torchcodec reads some that Pillow does not
        return None
