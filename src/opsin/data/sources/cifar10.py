"""CIFAR-10 as its authors publish it: 60,000 colour images of 32 x 32 pixels in ten classes.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

Shapes: N images of a part.
"""

import hashlib
import http.client
import os
import pickle
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from opsin.errors import DataError
from opsin.storage.lock import one_process_in

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
BASE_URL = "https://www.cs.toronto.edu/~kriz/"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCHES = ("test_batch",)

# Exceptions of tarfile, gzip and pickle on damaged bytes, and of our own code on other content.
_DAMAGE = (
    *(OSError, EOFError, tarfile.TarError, zlib.error, pickle.PickleError),
    *(ImportError, AttributeError, LookupError, TypeError, ValueError),
)
_TIMEOUT_S = 30
_CHUNK = 1 << 20


@dataclass
class Cifar10:
    """The images of batch files in a folder or archive; every process reads the pixels once, on first use."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    path: Path
    batches: tuple[str, ...]
    _pixels: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}

    def read(self, index: int) -> Tensor:
        """The image as uint8 [3, 32, 32]."""
        if self._pixels is None:
            self._pixels = read_batches(self.path, self.batches).pixels
        return self._pixels[index]

    def location(self, index: int) -> str:
        """`cifar-10-batches-py training image 17`."""
        return f"{self.path} {self.batches[0].split('_')[0]} image {index}"


@dataclass(frozen=True)
class Batches:
    """Batch files, one after the other: pixels uint8 [N, 3, 32, 32], labels int64 [N]."""

    classes: tuple[str, ...]
    labels: Tensor
    pixels: Tensor


def open_cifar10(path: Path) -> tuple[Cifar10, Cifar10]:
    """Return the training and test images of a folder of python batches or of their .tar.gz.

    Raises:
        DataError: a batch is missing or damaged.
    """
    train, test = read_batches(path, TRAIN_BATCHES), read_batches(path, TEST_BATCHES)
    return (
        Cifar10("cifar10 train", train.classes, train.labels, path, TRAIN_BATCHES, train.pixels),
        Cifar10("cifar10 test", test.classes, test.labels, path, TEST_BATCHES, test.pixels),
    )


def read_batches(path: Path, batches: tuple[str, ...]) -> Batches:
    """Read the named batch files of a folder or archive.

    Raises:
        DataError: a file is missing or damaged.
    """
    wanted = ("batches.meta", *batches)
    try:
        found = {name: _NumpyUnpickler(file, encoding="bytes").load() for name, file in _open_members(path, wanted)}
        missing = [name for name in wanted if name not in found]
        if missing:
            raise DataError(f"{path}: {missing[0]} is missing; CIFAR-10 has {', '.join(wanted)}: download it again")
        labels = [label for name in batches for label in found[name][b"labels"]]
        pixels = np.concatenate([found[name][b"data"] for name in batches]).reshape(len(labels), 3, 32, 32)
        classes = tuple(name.decode() for name in found["batches.meta"][b"label_names"])
    except _DAMAGE as error:
        raise DataError(f"{path}: not CIFAR-10 python batches ({error!r}); download it again") from error
    return Batches(classes, torch.tensor(labels, dtype=torch.int64), torch.from_numpy(pixels))


def _open_members(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, IO[bytes]]]:
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                with (path / name).open("rb") as file:
                    yield name, file
        return
    with tarfile.open(path) as archive:
        for member in archive:
            extracted = archive.extractfile(member)
            if extracted is not None and Path(member.name).name in names:
                yield Path(member.name).name, extracted


class _NumpyUnpickler(pickle.Unpickler):
    """Arrays, lists and dictionaries only: a pickle from elsewhere must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a batch of images")


def fetch_cifar10(cache: Path, *, base_url: str = BASE_URL, md5: str = ARCHIVE_MD5) -> Path:
    """Return the folder or archive in `cache`; without one the archive is downloaded, by one process at a time.

    The archive gets its name only when it is whole and verified.

    Raises:
        DataError: no network, or the server sends something else.
    """
    archive = cache / ARCHIVE
    with one_process_in(cache):
        if (cache / FOLDER).is_dir():
            return cache / FOLDER
        if not archive.exists():
            part = cache / f"{ARCHIVE}.part"
            _download(base_url + ARCHIVE, part, cache)
            _verify(part, md5, base_url + ARCHIVE)
            os.replace(part, archive)
    return archive


def _download(url: str, part: Path, cache: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, part.open("wb") as file:
            expected = answer.length
            shutil.copyfileobj(answer, file, _CHUNK)
            if expected is not None and file.tell() < expected:
                raise ConnectionError(f"the connection ended after {file.tell():,} of {expected:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        part.unlink(missing_ok=True)
        raise DataError(
            f"cifar10 is not in {cache} and {url} cannot be downloaded ({error}); try again, put that file into "
            f"{cache}, or set data.path to a folder {FOLDER} or to one with train.parquet and test.parquet"
        ) from error


def _verify(part: Path, md5: str, url: str) -> None:
    with part.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        part.unlink()
        raise DataError(f"{url}: md5 {found}, expected {md5}; the download was deleted, try again")
