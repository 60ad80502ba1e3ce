"""Scan of a collection: every image is decoded once, and its fingerprint, size and colours are kept.

An image takes 34 bytes, so that a million of them fit into little memory.

Shapes: N images of a collection, H, W of an image in pixels.
"""

import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opsin.data.base import UnreadableImage
from opsin.data.curation.collection import Collection
from opsin.data.curation.encoding import Encoding, find_encoding
from opsin.data.curation.fingerprint import MIN_DETAIL, Fingerprint, fingerprint
from opsin.data.quarantine import Failure
from opsin.errors import DataError
from opsin.processes.cores import num_cores
from opsin.reporting.console import duration
from opsin.storage.teller import Teller

_CHUNK = 64
_REPORT_EVERY_S = 10.0
_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Look:
    """The facts of one image. `mean` and `square` (the mean of squares) are of each channel, in 0..1."""

    index: int
    fingerprint: Fingerprint
    height: int
    width: int
    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    is_grey: bool
    encoding: Encoding | None


class Scan:
    """The facts of all images of a collection. Rows of unreadable images are zero."""

    def __init__(self, count: int) -> None:
        self.readable = np.zeros(count, dtype=np.bool_)
        self.exact = np.zeros(count, dtype=np.int64)
        """[N], equal for images with the same pixels."""
        self.perceptual = np.zeros((count, 2), dtype=np.uint64)
        """[N, 2], with mostly equal bits for images that look alike."""
        self.has_detail = np.zeros(count, dtype=np.bool_)
        """[N], false for images whose `perceptual` means nothing."""
        self.sizes = np.zeros((count, 2), dtype=np.int32)
        """[N, 2], height and width."""
        self.unreadable: list[Failure] = []
        self.formats: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        """Images by Pillow's name of their mode: RGB, L, RGBA, CMYK."""
        self.num_grey = self.num_alpha = self.num_16_bit = 0
        self._mean = np.zeros(3)
        self._square = np.zeros(3)

    @property
    def num_readable(self) -> int:
        """Images that could be decoded."""
        return int(self.readable.sum())

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel in 0..1; every image weighs the same, whatever its size."""
        return tuple((self._mean / self.num_readable).tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel in 0..1 over all pixels, weighted as for `mean`."""
        variance = self._square / self.num_readable - (self._mean / self.num_readable) ** 2
        return tuple(np.sqrt(variance.clip(0)).tolist())

    def add(self, look: _Look | Failure) -> None:
        """Add an image."""
        if isinstance(look, Failure):
            self.unreadable.append(look)
            return
        index = look.index
        self.readable[index] = True
        self.exact[index] = look.fingerprint.exact
        self.perceptual[index] = look.fingerprint.perceptual
        self.has_detail[index] = look.fingerprint.detail >= MIN_DETAIL
        self.sizes[index] = look.height, look.width
        self.num_grey += look.is_grey
        self._mean += look.mean
        self._square += look.square
        if look.encoding is not None:
            self.formats[look.encoding.file_format] += 1
            self.modes[look.encoding.mode] += 1
            self.num_alpha += look.encoding.has_alpha
            self.num_16_bit += look.encoding.has_16_bits


def scan(collection: Collection, teller: Teller) -> Scan:
    """Decode every image once, in threads, and report every ten seconds how many are done.

    Raises:
        DataError: no image can be read.
    """
    found = Scan(len(collection))
    started = reported = time.monotonic()
    done = 0
    for looks in _in_threads(collection):
        for look in looks:
            found.add(look)
        done += len(looks)
        now = time.monotonic()
        if now - reported >= _REPORT_EVERY_S:
            reported = now
            left = duration((now - started) * (len(collection) - done) / done)
            teller.notice(f"looked at {done:,} of {len(collection):,} images, {left} left")
    if not found.num_readable:
        first = found.unreadable[0]
        raise DataError(
            f"{collection.name}: none of its {len(collection)} images can be read ({first.location}: {first.reason}, "
            "...); at least one is needed: check the path"
        )
    return found


def _in_threads(collection: Collection) -> Iterator[Sequence[_Look | Failure]]:
    """Yield the facts of all images in their order; only a few chunks wait at any time."""
    threads = min(32, num_cores())
    waiting: deque[Future[list[_Look | Failure]]] = deque()
    # Decoders release the interpreter lock. Their warnings are not shown: modes are counted instead.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        try:
            for first in range(0, len(collection), _CHUNK):
                chunk = range(first, min(first + _CHUNK, len(collection)))
                waiting.append(pool.submit(lambda indices: [_look(collection, index) for index in indices], chunk))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _look(collection: Collection, index: int) -> _Look | Failure:
    try:
        image = collection.read(index)
        encoding = find_encoding(collection, index)
    except UnreadableImage as error:
        return Failure(index, collection.location(index), str(error))
    pixels: NDArray[np.uint8] = np.ascontiguousarray(image.permute(1, 2, 0).numpy())  # [H, W, 3]
    height, width, channels = pixels.shape
    flat = pixels.reshape(-1, channels)
    total, square = np.zeros(channels), np.zeros(channels)
    # Integers as long as they are exact; in pieces, since a large photograph would need gigabytes at once.
    for first in range(0, len(flat), _ROWS):
        part = flat[first : first + _ROWS]
        total += part.sum(axis=0, dtype=np.uint64)
        square += np.square(part, dtype=np.uint16).sum(axis=0, dtype=np.uint64)
    return _Look(
        index=index,
        fingerprint=fingerprint(pixels),
        height=height,
        width=width,
        mean=total / len(flat) / 255,
        square=square / len(flat) / 255**2,
        is_grey=bool((flat[:, :1] == flat[:, 1:]).all()),
        encoding=encoding,
    )
