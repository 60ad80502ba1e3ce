"""Groups of images that are copies of each other, found without comparing all pairs.

Two hashes of 128 bits that differ in at most n bits agree in all bits of at least one of n + 1 bands. So the hashes
are sorted by each band, and only those with an equal band are compared. For N images of which k share a band with
another one on average that is n + 1 sorts, O(n N log N), and O(n N k) comparisons: with n = 8 and photographs k is
about N / 8,000 (measured on CIFAR-10). A band takes every (n + 1)-th bit, since bits of neighbouring cells are
nearly the same.

Shapes: N images, P pairs, M different hashes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opsin.data.curation.collection import Collection
from opsin.data.curation.fingerprint import BITS
from opsin.data.curation.scan import Scan
from opsin.errors import ConfigError

Integers = NDArray[np.int64]

MAX_BITS = 16
"""Beyond it pictures of other things begin to count as copies, and bands become too short to tell images apart."""

_MANY = 20
_LARGE_SHARE = 0.01


@dataclass(frozen=True)
class Groups:
    """A partition of the images into groups of copies; most images are alone in theirs."""

    of_image: Integers
    """The lowest index of an image's group: [N]."""
    shared: tuple[Integers, ...]
    """The members of every group with several images, ascending, by lowest member."""
    num_exact: int
    """Number of these groups whose images have equal pixels."""

    def doubts(self, collection: Collection) -> str | None:
        """Return a warning if a group is so large that the hash may confuse its images."""
        largest = max(self.shared, key=len, default=np.zeros(0, dtype=np.int64))
        if len(largest) <= max(_MANY, _LARGE_SHARE * len(self.of_image)):
            return None
        first, last = collection.location(int(largest[0])), collection.location(int(largest[-1]))
        return (
            f"the largest group of duplicates has {len(largest):,} images, from {first} to {last}; if these show "
            "different things, lower --near-duplicates (off compares pixels only)"
        )


def group_duplicates(scan: Scan, *, max_bits: int | None) -> Groups:
    """Group images with equal pixels, or with perceptual hashes that differ in at most `max_bits`.

    Likeness is passed on: two images of a group may be joined only by a third. Hashes of images without detail are
    not compared, and none are if `max_bits` is None. Unreadable images stay alone.
    """
    pairs = [_equal_pairs(scan.exact, scan.readable)]
    if max_bits is not None:
        detailed = np.flatnonzero(scan.readable & scan.has_detail)
        pairs.append(detailed[near_pairs(scan.perceptual[detailed], max_bits)])
    of_image = _join(len(scan.readable), np.concatenate(pairs))
    order = np.argsort(of_image, kind="stable")
    starts = np.flatnonzero(np.diff(of_image[order], prepend=-1))
    shared = tuple(members for members in np.split(order, starts[1:]) if len(members) > 1)
    num_exact = sum(len(np.unique(scan.exact[members])) == 1 for members in shared)
    return Groups(of_image, shared, num_exact)


def check_max_bits(max_bits: int | None) -> None:
    """Refuse a limit with which a search would not end in time.

    Raises:
        ConfigError: it is negative, or so high that most bands of most images are equal.
    """
    if max_bits is not None and not 0 <= max_bits <= MAX_BITS:
        raise ConfigError(
            f"command line: --near-duplicates {max_bits}: of the {BITS} bits of a hash, 0 to {MAX_BITS} may differ; "
            "use 8, or off to compare pixels only"
        )


def near_pairs(hashes: NDArray[np.uint64], max_bits: int) -> Integers:
    """Return pairs of rows of `hashes` [N, 2] that differ in at most `max_bits` bits: [P, 2], the lower row first.

    Of rows with the same hash only neighbours are paired, which is enough to join them.
    """
    distinct, inverse = np.unique(hashes, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    first = np.zeros(len(distinct), dtype=np.int64)
    first[inverse[::-1]] = np.arange(len(hashes))[::-1]
    found = [_equal_pairs(inverse, np.ones(len(hashes), dtype=np.bool_))]
    for band in range(max_bits + 1 if max_bits else 0):
        found += [first[pair] for pair in _close_in_band(distinct, _band_mask(band, max_bits + 1), max_bits)]
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _band_mask(band: int, bands: int) -> NDArray[np.uint64]:
    """Return the bits of a band: two words."""
    bits = np.zeros(BITS, dtype=np.uint8)
    bits[band::bands] = 1
    return np.packbits(bits).view(np.uint64)


def _close_in_band(hashes: NDArray[np.uint64], mask: NDArray[np.uint64], max_bits: int) -> Iterator[Integers]:
    """Yield pairs of different hashes [M, 2] with an equal band and at most `max_bits` different bits, in portions."""
    bands = hashes & mask
    order = np.lexsort((bands[:, 1], bands[:, 0]))
    ordered = bands[order]
    changes = np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1
    ends = np.append(changes, len(order))
    end = np.repeat(ends, np.diff(ends, prepend=0))  # [M] where the run of equal bands ends
    left = np.arange(len(order))
    offset = 1
    # All pairs at distance 1 in their run, then those at distance 2, as long as any run is that long.
    while len(left := left[left + offset < end[left]]):
        a, b = order[left], order[left + offset]
        different = np.bitwise_count(hashes[a] ^ hashes[b]).sum(axis=1, dtype=np.uint8)
        close = different <= max_bits
        if close.any():
            yield np.stack([a[close], b[close]], axis=1)
        offset += 1


def _equal_pairs(values: NDArray[np.int64], wanted: NDArray[np.bool_]) -> Integers:
    """Return neighbours among the wanted rows with one value: [P, 2]."""
    rows = np.flatnonzero(wanted)
    rows = rows[np.argsort(values[rows], kind="stable")]
    equal = values[rows[1:]] == values[rows[:-1]]
    return np.stack([rows[:-1][equal], rows[1:][equal]], axis=1)


def _join(count: int, pairs: Integers) -> Integers:
    """Return the lowest member of each one's component: [N]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs), dtype=np.bool_), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, component = connected_components(edges, directed=False)
    _, first = np.unique(component, return_index=True)
    return np.asarray(first[component], dtype=np.int64)
