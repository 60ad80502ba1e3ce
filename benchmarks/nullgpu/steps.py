"""Kernels, waits and memory of training steps, counted on a GPU that does nothing.

    benchmarks/nullgpu/run.sh benchmarks/nullgpu/steps.py             kernels and waits of one step of each recipe
    benchmarks/nullgpu/run.sh benchmarks/nullgpu/steps.py --memory    the largest batch for each size of GPU
    ... --only dino                                                   rows whose name contains a word

The numbers are exact and say nothing about time. Memory is what torch's allocator has reserved in an update; on a GPU,
a context of about half a GiB and the workspaces of cuDNN come on top. Convolutions are counted in fp16: see run.sh.
"""

import argparse
import gc
import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from interleaved import table
from nullgpu.watch import NullGpu, Seen
from opsin.data.base import Batch
from opsin.methods.base import Method
from opsin.reporting.console import Console
from opsin.run.assemble import temporary_run
from opsin.run.recipe import read
from opsin.training.loop import Run
from opsin.training.step import train_step

PHOTO, SMALL = 256, 32
NO_SCORES = ("evaluators.knn=null", "evaluators.linear=null")
IMAGENET_DINO = ("dino-imagenet-vits16", *NO_SCORES)


@dataclass(frozen=True, slots=True)
class Row:
    """A recipe with changes; `side` is that of its pictures, which stay in memory if they are small."""

    name: str
    batch: int
    side: int
    recipe: tuple[str, ...]


STEPS = [
    Row("DINO ViT-S/16, 2 x 224 + 8 x 96", 64, PHOTO, IMAGENET_DINO),
    Row("the same", 256, PHOTO, IMAGENET_DINO),
    Row("the same, view_chunk=2", 64, PHOTO, (*IMAGENET_DINO, "memory.view_chunk=2")),
    Row("DINO ResNet-18, CIFAR-10, fp16", 512, SMALL, ("dino-cifar10", *NO_SCORES, "precision=fp16")),
    Row("I-JEPA, CIFAR-10", 512, SMALL, ("ijepa-cifar10", *NO_SCORES, "evaluators.maps=null")),
    Row("H-JEPA, CIFAR-10, Muon", 512, SMALL, ("hjepa-cifar10", *NO_SCORES, "evaluators.maps=null")),
    Row("ViT, CIFAR-10", 512, SMALL, ("cifar10-vit-strong",)),
    Row("ResNet-50, fp16", 256, PHOTO, ("imagenet-resnet50", "precision=fp16")),
]
BATCHES = (32, 64, 128, 256, 512, 1024, 2048)
CARDS_GIB = (12, 16, 24, 40, 80)
RESERVE_GIB = 1.5
"""Memory of a card that torch's allocator does not get: its context, libraries, workspaces."""
MEMORY = [
    Row("DINO ViT-S/16, 2 x 224 + 8 x 96", 0, PHOTO, IMAGENET_DINO),
    Row("the same, view_chunk=2", 0, PHOTO, (*IMAGENET_DINO, "memory.view_chunk=2")),
    Row("the same, checkpoint_blocks", 0, PHOTO, (*IMAGENET_DINO, "memory.checkpoint_blocks=true")),
    Row("I-JEPA, CIFAR-10", 0, SMALL, ("ijepa-cifar10", *NO_SCORES, "evaluators.maps=null")),
    Row("H-JEPA, CIFAR-10", 0, SMALL, ("hjepa-cifar10", *NO_SCORES, "evaluators.maps=null")),
    Row("ViT, CIFAR-10", 0, SMALL, ("cifar10-vit-strong",)),
    Row("ResNet-50, fp16", 0, PHOTO, ("imagenet-resnet50", "precision=fp16")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    gpu = NullGpu()
    with tempfile.TemporaryDirectory() as folder:
        for side in (PHOTO, SMALL):
            draw_pictures(Path(folder) / str(side), side, count=2 * max(BATCHES))
        if arguments.memory:
            rows = [memory_row(row, Path(folder)) for row in MEMORY if arguments.only in " ".join(row.recipe)]
            print(table(["largest batch", *(f"{card} GiB" for card in CARDS_GIB), "peak GiB at 64", "at 256"], rows))
            return
        rows = []
        for row in STEPS:
            if arguments.only in " ".join(row.recipe):
                views, update = counted(row, Path(folder), gpu)
                waits = views.waits + update.waits
                rows.append(
                    [row.name, f"{row.batch}", f"{views.launches:,}", f"{update.launches:,}", f"{waits.total()}"]
                )
                for what, count in waits.most_common():
                    print(f"{row.name}: {count}x {what}", file=sys.stderr)
        print(table(["", "batch", "kernels of the views", "of the update", "waits"], rows))


def draw_pictures(folder: Path, side: int, *, count: int) -> None:
    """Ten class folders with pictures of noise; most are links to a few of them."""
    drawn = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), dtype=np.uint8)
    for number in range(count):
        path = folder / f"{number % 10}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < len(drawn):
            Image.fromarray(drawn[number]).save(path)
        else:
            path.hardlink_to(folder / f"{number % 64 % 10}" / f"{number % 64:05}.png")


@contextmanager
def assembled(row: Row, folder: Path, batch_size: int) -> Iterator[Run]:
    """A run of the row, without workers."""
    name, *changes = row.recipe
    own = [f"data.path={folder / str(row.side)}", f"data.resident={'true' if row.side == SMALL else 'false'}"]
    settings = [
        "device=cuda",
        "data.workers=0",
        "data.holdout=0.01",
        "memory.fit=off",
        f"batch_size={batch_size}",
        *own,
    ]
    with temporary_run(read(name, [*settings, *changes]), Console(io.StringIO())) as run:
        yield run


def counted(row: Row, folder: Path, gpu: NullGpu) -> tuple[Seen, Seen]:
    """The batch and the update of the third step, when all memory is there."""
    with assembled(row, folder, row.batch) as run:
        state = run.start.fresh()
        batches = run.data.batches(0, 3)
        for _ in range(2):
            train_step(state, next(batches), run.plan)
        with gpu.watching() as views:
            batch = next(batches)
        with gpu.watching() as update:
            train_step(state, batch, run.plan)
    return views, update


def empty_batch(method: Method, run: Run, images: int) -> Batch:
    """A batch without pictures, whose memory is that of any other."""
    views, ids = method.views(run.data.facts.image_size), torch.arange(images)
    pixels = {
        name: torch.empty(crop.count, images, 3, crop.size, crop.size, device="cuda")
        for name, crop in views.crops.items()
    }
    masks = {} if views.masks is None else {name: mask.cuda() for name, mask in views.masks(0, 0, ids).items()}
    return Batch(pixels, torch.zeros_like(ids).cuda(), ids.cuda(), masks)


def memory_row(row: Row, folder: Path) -> list[str]:
    """The largest batch that trains, by card, and the peak memory of two batches."""
    peaks = {size: peak for size in BATCHES if (peak := peak_gib(row, folder, size)) is not None}
    fits = [[size for size, peak in peaks.items() if peak <= card - RESERVE_GIB] for card in CARDS_GIB]
    return [row.name, *(str(max(sizes, default="-")) for sizes in fits), *(gib(peaks, size) for size in (64, 256))]


def gib(peaks: dict[int, float], size: int) -> str:
    return f"{peaks[size]:.1f}" if size in peaks else "-"


def peak_gib(row: Row, folder: Path, batch_size: int) -> float | None:
    """Peak memory of two steps in GiB; None if they do not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        with assembled(row, folder, batch_size) as run:
            state = run.start.fresh()
            for _ in range(2):
                train_step(state, empty_batch(state.method, run, batch_size), run.plan)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_reserved() / 2**30


if __name__ == "__main__":
    main()
