"""Groups of copies, compared with a search over all pairs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from opsin.data.curation.duplicates import check_max_bits, group_duplicates, near_pairs
from opsin.data.curation.scan import Scan
from opsin.errors import ConfigError
from tests.unit.data.curation.scenes import classes, looked_at, scene


def clustered_hashes(count: int, seed: int) -> NDArray[np.uint64]:
    """Hashes around a few centres, some equal: distances of all sizes from 0 on."""
    generator = np.random.default_rng(seed)
    centres = generator.random((5, 128)) < 0.5
    flips = generator.random((count, 128)) < generator.choice([0.0, 0.01, 0.03, 0.1], count)[:, None]
    bits = centres[generator.integers(0, 5, count)] ^ flips
    return np.packbits(bits, axis=1).view(np.uint64)


def components(count: int, pairs: set[tuple[int, int]]) -> set[frozenset[int]]:
    """Connected components, by spreading labels until nothing changes."""
    label = list(range(count))
    changed = True
    while changed:
        changed = False
        for a, b in pairs:
            low = min(label[a], label[b])
            changed |= label[a] != low or label[b] != low
            label[a] = label[b] = low
    return {frozenset(i for i in range(count) if label[i] == low) for low in set(label)}


def all_pairs(hashes: NDArray[np.uint64], max_bits: int) -> set[tuple[int, int]]:
    rows = [int(a) | int(b) << 64 for a, b in hashes.tolist()]
    return {(i, j) for j in range(len(rows)) for i in range(j) if (rows[i] ^ rows[j]).bit_count() <= max_bits}


@pytest.mark.parametrize("max_bits", [0, 1, 4, 8, 16])
def test_the_search_in_bands_finds_what_comparing_all_pairs_finds(max_bits: int) -> None:
    hashes = clustered_hashes(300, seed=max_bits)
    expected = all_pairs(hashes, max_bits)
    found = {(a, b) for a, b in near_pairs(hashes, max_bits).tolist()}
    # Of equal hashes only neighbours are paired; what they join is the same.
    assert found <= expected
    assert components(300, found) == components(300, expected)
    distinct = np.unique(hashes, axis=0)
    assert {(a, b) for a, b in near_pairs(distinct, max_bits).tolist()} == all_pairs(distinct, max_bits)
    assert len(expected) > 300


def test_groups_hold_each_image_once_and_unreadable_ones_alone() -> None:
    hashes = clustered_hashes(200, seed=1)
    found = Scan(200)
    found.readable[:] = True
    found.readable[::17] = False
    found.has_detail[:] = True
    found.exact[:] = np.arange(200)
    found.perceptual[:] = hashes
    groups = group_duplicates(found, max_bits=4)
    members = [index for group in groups.shared for index in group.tolist()]
    assert len(members) == len(set(members))
    assert not set(members) & set(range(0, 200, 17))
    readable = {(i, j) for i, j in all_pairs(hashes, 4) if i % 17 and j % 17}
    expected = {group for group in components(200, readable) if len(group) > 1}
    assert {frozenset(group.tolist()) for group in groups.shared} == expected
    assert all(groups.of_image[group].tolist() == [group.min()] * len(group) for group in groups.shared)
    assert groups.num_exact == 0


def test_copies_are_found_and_flat_images_only_where_their_pixels_are_equal(tmp_path: Path) -> None:
    folder = classes(tmp_path, a=4, b=3)
    shutil.copy(folder / "a/001.png", folder / "b/same.png")
    scene(2).resize((96, 80), Image.Resampling.BICUBIC).save(folder / "b/larger.jpg", quality=85)
    for name, colour in {"grey": 100, "grey-too": 100, "other-grey": 101}.items():
        Image.new("RGB", (48, 40), (colour,) * 3).save(folder / f"a/{name}.png")
    collection, _, groups = looked_at(folder)
    named = [{collection.location(i).removeprefix(f"{folder}/") for i in group.tolist()} for group in groups.shared]
    expected = [{"a/001.png", "b/same.png"}, {"a/002.png", "b/larger.jpg"}, {"a/grey.png", "a/grey-too.png"}]
    assert sorted(named, key=sorted) == sorted(expected, key=sorted)
    assert groups.num_exact == 2

    _, _, exact_only = looked_at(folder, max_bits=None)
    assert len(exact_only.shared) == exact_only.num_exact == 2


def test_a_huge_group_is_doubted(tmp_path: Path) -> None:
    folder = classes(tmp_path, a=4, b=3)
    collection, _, groups = looked_at(folder)
    assert groups.doubts(collection) is None
    for number in range(21):
        shutil.copy(folder / "a/001.png", folder / f"b/copy{number}.png")
    collection, _, groups = looked_at(folder)
    said = groups.doubts(collection)
    assert said is not None
    assert said.startswith("the largest group of duplicates has 22 images, from ")


@pytest.mark.parametrize("max_bits", [-1, 17])
def test_a_limit_without_sense_is_refused(max_bits: int) -> None:
    with pytest.raises(ConfigError, match=f"--near-duplicates {max_bits}: of the 128 bits of a hash, 0 to 16 may"):
        check_max_bits(max_bits)
