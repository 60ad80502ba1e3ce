"""Small pictures for tests, made with Pillow."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(height: int = 12, width: int = 10, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours with some noise: uint8 [height, width, channels]."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(columns / (3 + c)) + np.cos(rows / (2 + c)) for c in range(channels)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 8, waves.shape)
    return (128 + 50 * waves + noise).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png(seed: int = 0) -> bytes:
    """A small picture, different for each seed."""
    return encoded(Image.fromarray(pixels(seed=seed)))


def fill(folder: Path, *names: str) -> Path:
    """Write a picture under each name, the n-th with seed n, and return the folder."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(seed))
    return folder
