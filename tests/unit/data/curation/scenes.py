"""Pictures that do not look alike, and folders of them."""

from pathlib import Path

import numpy as np
from PIL import Image

from opsin.data.curation.collection import Collection, open_collection
from opsin.data.curation.duplicates import Groups, group_duplicates
from opsin.data.curation.scan import Scan, scan
from opsin.storage.teller import Silence


def scene(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Patches of random colours with smooth borders; two seeds have nothing in common."""
    patches = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def fill(folder: Path, *names: str, first_seed: int = 0) -> Path:
    """A scene under each name, the n-th with seed `first_seed` + n, as PNG."""
    for seed, name in enumerate(names, first_seed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scene(seed).save(folder / name)
    return folder


def classes(folder: Path, **counts: int) -> Path:
    """A class folder with this number of scenes for each name."""
    first = 0
    for name, count in counts.items():
        fill(folder, *(f"{name}/{number:03d}.png" for number in range(count)), first_seed=first)
        first += count
    return folder


def looked_at(path: Path, max_bits: int | None = 8) -> tuple[Collection, Scan, Groups]:
    """The scan of a folder, and its groups of copies."""
    collection = open_collection(str(path))
    found = scan(collection, Silence())
    return collection, found, group_duplicates(found, max_bits=max_bits)
