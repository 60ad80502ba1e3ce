"""Images per second and core, from stored files to normalised batches: opsin against torchvision.

    PYTHONPATH=src python benchmarks/data_throughput.py [--rounds 5]

Both read the same pictures, cut a random resized crop, mirror half of them and normalise, in one
process with one thread. torchvision: `ImageFolder`, its transforms, `DataLoader`; it always reads
JPEG files from class folders, also where opsin reads a table or keeps decoded pictures in memory.
The pictures are made for the purpose: smooth colours with some grain, which compress like photographs.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from interleaved import table, take_turns
from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import DataFacts
from opsin.data.loading import LoadingPlan, TrainingData
from opsin.data.order import Order
from opsin.data.quarantine import Quarantine
from opsin.data.sources.open import open_sources
from opsin.methods.supervised import SupervisedViews

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of storage with pictures of one size."""

    name: str
    kind: Literal["folder", "parquet"]
    width: int
    height: int
    count: int
    crop: int
    resident: bool = False


CASES = [
    Case("folder, 500 x 375 JPEG, crop 224", "folder", 500, 375, 128, 224),
    Case("folder, 500 x 375 JPEG, crop 96", "folder", 500, 375, 128, 96),
    Case("folder, 2000 x 1500 JPEG, crop 224", "folder", 2000, 1500, 32, 224),
    Case("folder, 32 x 32 JPEG, crop 32", "folder", 32, 32, 1024, 32),
    Case("parquet, 500 x 375 JPEG, crop 224", "parquet", 500, 375, 128, 224),
    Case("parquet, 32 x 32 JPEG, crop 32", "parquet", 32, 32, 1024, 32),
    Case("in memory, 32 x 32, crop 32", "folder", 32, 32, 1024, 32, resident=True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            stored = Path(folder) / "images"
            kilobytes = write_pictures(case, stored)
            passes = {"torchvision": torchvision_pass(case, stored), "opsin": opsin_pass(case, stored, Path(folder))}
            theirs, own = take_turns(passes, rounds=arguments.rounds, warmup=1)
        speeds = [f"{case.count / timing.median_s:.0f}" for timing in (theirs, own)]
        rows.append([case.name, f"{kilobytes:.0f}", *speeds, f"{own.speed_over(theirs):.2f}x"])
    print("Images per second and core, one process, one thread")
    print(table(["", "kB/image", "torchvision", "opsin", "speed"], rows))


def torchvision_pass(case: Case, stored: Path) -> Callable[[], None]:
    """One pass over the pictures by torchvision, from class folders whatever the case is stored in."""
    transform = Compose([RandomResizedCrop(case.crop), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)])
    loader = DataLoader(ImageFolder(str(stored), transform), batch_size=BATCH, shuffle=True, drop_last=True)

    def run() -> None:
        for _ in loader:
            pass

    return run


def opsin_pass(case: Case, stored: Path, folder: Path) -> Callable[[], None]:
    """One pass over the pictures by opsin; each call is the next epoch."""
    path = stored if case.kind == "folder" else write_parquet(stored, folder)
    source = open_sources(str(path), kind=case.kind, cache=folder).train
    steps = len(source) // BATCH
    facts = DataFacts(source.classes, len(source), case.crop, 3, MEAN, STD)
    data = TrainingData(
        LoadingPlan(source=source, facts=facts, device=torch.device("cpu"), resident=case.resident),
        [SupervisedViews().build(case.crop)],
        Order(seed=0, labels=source.labels, timeline=Timeline([Stage(1000, BATCH, steps)]), drop_last=True),
        Quarantine(folder / "quarantine.txt", total=len(source), limit=0.0),
    )
    starts = iter(range(0, 1000 * steps, steps))

    def run() -> None:
        start = next(starts)
        for _ in data.batches(start, start + steps):
            pass

    return run


def write_pictures(case: Case, folder: Path) -> float:
    """Pictures in two class folders; gives their mean size in kB."""
    random = np.random.default_rng(0)
    total = 0
    for number in range(case.count):
        path = folder / f"class{number % 2}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (max(2, case.height // 24), max(2, case.width // 24), 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((case.width, case.height), Image.Resampling.BICUBIC)
        grain = random.normal(0, 8, (case.height, case.width, 3))
        Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
        total += path.stat().st_size
    return total / case.count / 1e3


def write_parquet(folder: Path, target: Path) -> Path:
    """The same pictures in one table, in the layout of dataset hubs."""

    def rows() -> Iterator[dict[str, object]]:
        for path in sorted(folder.glob("*/*.jpg")):
            yield {"img": {"bytes": path.read_bytes(), "path": path.name}, "label": int(path.parent.name[-1])}

    path = target / "train.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows())), path)
    return path


if __name__ == "__main__":
    main()
