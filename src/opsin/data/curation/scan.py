"""One look at every image of a collection: what the data tools know of it is kept, the pixels are not.

An image leaves 34 bytes behind, so that a million of them fit into little memory.

Shapes: N images of a collection, H, W of an image in pixels.
"""

import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opsin.data.base import UnreadableImage
from opsin.data.curation.collection import Collection
from opsin.data.curation.encoding import Encoding, find_encoding
from opsin.data.curation.fingerprint import MIN_DETAIL, Fingerprint, fingerprint
from opsin.data.quarantine import Failure
from opsin.errors import DataError
from opsin.reporting.console import duration

_CHUNK = 64
_SAY_EVERY_S = 10.0
_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Look:
    """What one image says. `mean` and `square` are of each channel, in 0..1."""

    index: int
    fingerprint: Fingerprint
    height: int
    width: int
    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    is_grey: bool
    encoding: Encoding | None


@dataclass
class Scan:
    """What is known of all images. Rows of unreadable ones are zero."""

    readable: NDArray[np.bool_]
    exact: NDArray[np.int64]
    """Equal for images with the same pixels: [N]."""
    perceptual: NDArray[np.uint64]
    """Bits that are mostly equal for images that look alike: [N, 2]."""
    has_detail: NDArray[np.bool_]
    """Whether `perceptual` says anything: [N]."""
    sizes: NDArray[np.int32]
    """Height and width: [N, 2]."""
    unreadable: list[Failure] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    """Pillow's names: RGB, L, RGBA, CMYK."""
    num_grey: int = 0
    """Images whose three channels are equal."""
    num_alpha: int = 0
    num_16_bit: int = 0
    _mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    _square: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))

    @classmethod
    def empty(cls, count: int) -> "Scan":
        """The scan of `count` images before the first is read."""
        flags = np.zeros((2, count), dtype=np.bool_)
        return cls(
            flags[0],
            np.zeros(count, dtype=np.int64),
            np.zeros((count, 2), dtype=np.uint64),
            flags[1],
            np.zeros((count, 2), dtype=np.int32),
        )

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

    def note(self, look: _Look | Failure) -> None:
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


def scan(collection: Collection, *, say: Callable[[str], None]) -> Scan:
    """Decode every image once, in threads; `say` hears every ten seconds how far it is.

    Raises:
        DataError: no image can be read.
    """
    found = Scan.empty(len(collection))
    started = said = time.monotonic()
    done = 0
    for looks in _in_threads(collection):
        for look in looks:
            found.note(look)
        done += len(looks)
        now = time.monotonic()
        if now - said >= _SAY_EVERY_S:
            said = now
            left = duration((now - started) * (len(collection) - done) / done)
            say(f"looked at {done:,} of {len(collection):,} images, {left} left")
    if not found.num_readable:
        first = found.unreadable[0]
        raise DataError(
            f"{collection.name}: none of its {len(collection)} images can be read ({first.location}: {first.reason}, "
            "...); at least one is needed: check the path"
        )
    return found


def _in_threads(collection: Collection) -> Iterator[Sequence[_Look | Failure]]:
    """The looks at all images, in their order; only a few chunks are on the way at any time."""
    threads = min(32, os.cpu_count() or 1)
    waiting: deque[Future[list[_Look | Failure]]] = deque()
    # Decoders release the interpreter lock. Their warnings are told as counts of modes, if at all.
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
