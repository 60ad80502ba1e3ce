"""Multi-crop views per second and core: opsin against the published pipeline of PIL images.

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/multicrop.py [--rounds 5] [--images 64]

Two large and eight small views of each image, in one process with one thread, up to normalised floats.
The published pipeline is written out below: Pillow decodes, torchvision's transforms and Pillow's filters
change one PIL image after the other. The photographs are crops of scikit-learn's two samples.

photographs   500 x 375 JPEG, views of 224 and 96 pixels; both sides decode
stored        the same with a shorter side of 256, decoded before: PIL images there, uint8 tensors here
small         32 x 32, views of 32 and 16 pixels; PNG in memory there, uint8 resident in memory here

"host" is what the CPU has left to do where a GPU colours and normalises: read, crop, resize.
"""

import argparse
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import transforms

from interleaved import table, take_turns
from opsin.data.base import Augment, DataFacts, Views
from opsin.data.decode import decode
from opsin.data.loading import _Finish
from opsin.data.resident import Resident
from opsin.data.views.colour import ColorJitter, GaussianBlur, Grayscale, Normalize, Solarize, num_cached
from opsin.data.views.crops import Crop, RandomResizedCrop
from opsin.data.workers import RawBatch, Reader, Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)
BATCH = 32
SMALL_COPIES = 8  # a pass over small images takes so many times as many of them
CPU = torch.device("cpu")


class Pictures:
    """Images in memory as a `Source`: encoded, or decoded as uint8 [3, H, W] whose memory is ordered [H, W, 3]."""

    name = "pictures"
    classes: tuple[str, ...] = ("a",)

    def __init__(self, stored: Sequence[bytes | Tensor]) -> None:
        self.stored = stored
        self.labels = torch.zeros(len(stored), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.stored)

    def read(self, index: int) -> Tensor:
        stored = self.stored[index]
        return stored if isinstance(stored, Tensor) else decode(stored)

    def location(self, index: int) -> str:
        return str(index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    photographs = make_photographs(arguments.images)
    encoded = [encode(image, "JPEG", quality=(95, 98)[number % 2]) for number, image in enumerate(photographs)]
    shrunk = [shrink(image, 256) for image in photographs]
    tiny = [image.resize((32, 32), Image.Resampling.BICUBIC) for image in photographs] * SMALL_COPIES
    print(f"{len(encoded)} JPEG of {sum(map(len, encoded)) / len(encoded) / 1e3:.0f} kB on average")

    large, small = partial(published_pass, sizes=(224, 96)), partial(published_pass, sizes=(32, 16))
    ours: dict[str, tuple[Reader | Resident, tuple[int, int]]] = {
        "photographs": (reader(encoded), (224, 96)),
        "stored": (reader([to_tensor(image) for image in shrunk]), (224, 96)),
        "small": (resident(tiny), (32, 16)),
    }
    passes: dict[str, Callable[[], None]] = {
        "photographs: published": partial(large, encoded),
        "stored: published": partial(large, shrunk),
        "small: published": partial(small, [encode(image, "PNG") for image in tiny]),
    }
    for name, (images, sizes) in ours.items():
        passes[f"{name}: opsin"] = partial(opsin_pass, images, sizes, finish=True)
        # As where a GPU colours them.
        host = replace(images, interleaved=True) if isinstance(images, Reader) else images
        passes[f"{name}: opsin, host"] = partial(opsin_pass, host, sizes, finish=False)
    timings = {timing.name: timing for timing in take_turns(passes, rounds=arguments.rounds, warmup=1)}
    rows = []
    for name in passes:
        kind, timing = name.partition(":")[0], timings[name]
        count = len(tiny) if kind == "small" else len(encoded)
        over = [timing.speed_over(timings[f"{base}: published"]) for base in (kind, "photographs")]
        shown = [f"{over[0]:.2f}x", "" if kind == "small" else f"{over[1]:.2f}x"]
        rows.append([name, f"{count / timing.median_s:.0f}", *shown])
    print("\nImages per second and core, 2 + 8 views each")
    print(table(["", "images/s", "over published", "over published from JPEG"], sorted(rows)))
    print("\nMilliseconds per photograph of each stage, all ten views")
    print(table(["", "published", "opsin", "speed"], stage_rows(encoded[:BATCH], rounds=arguments.rounds)))


def make_photographs(count: int) -> list[Image.Image]:
    """500 x 375 pixels each, from random crops of the two samples."""
    chosen = random.Random(0)
    samples = [Image.fromarray(array) for array in load_sample_images().images]
    photographs = []
    for number in range(count):
        sample, width = samples[number % 2], chosen.randint(400, 560)
        height = width * 3 // 4
        left, top = chosen.randint(0, sample.width - width), chosen.randint(0, sample.height - height)
        cut = sample.crop((left, top, left + width, top + height))
        photographs.append(cut.resize((500, 375), Image.Resampling.BICUBIC))
    return photographs


def encode(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shrink(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def reader(stored: Sequence[bytes | Tensor]) -> Reader:
    return Reader(Pictures(stored), seed=0)


def resident(images: Sequence[Image.Image]) -> Resident:
    stacked = torch.stack([to_tensor(image) for image in images]).contiguous()
    return Resident(stacked, torch.zeros(len(images), dtype=torch.int64), seed=0)


# The published pipeline ---------------------------------------------------------------------------------------------


class PillowBlur:
    """Pillow's Gaussian blur with probability `p` and a radius from 0.1 to 2."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))) if random.random() < self.p else image


class PillowSolarize:
    """Pillow's solarize with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


def published_stages(blur: float, solarize: float) -> dict[str, Callable[[object], object]]:
    """What follows the crop, by name."""
    jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    return {
        "jitter": transforms.RandomApply([jitter], p=0.8),
        "grey": transforms.RandomGrayscale(p=0.2),
        "blur": PillowBlur(blur),
        "solarize": PillowSolarize(solarize),
        "normalise": transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)]),
    }


def published_crop(size: int, scale: tuple[float, float]) -> transforms.Compose:
    crop = transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip()])


def published_views(sizes: tuple[int, int]) -> list[dict[str, Callable[[object], object]]]:
    """Ten chains of stages, one for each view; `sizes` of large and small views in pixels."""
    large, small = sizes
    return [
        {"crops": published_crop(large, GLOBAL), **published_stages(1.0, 0.0)},
        {"crops": published_crop(large, GLOBAL), **published_stages(0.1, 0.2)},
        *[{"crops": published_crop(small, LOCAL), **published_stages(0.5, 0.0)}] * 8,
    ]


def open_image(stored: bytes | Image.Image) -> Image.Image:
    return stored if isinstance(stored, Image.Image) else Image.open(io.BytesIO(stored)).convert("RGB")


def published_pass(stored: Sequence[bytes | Image.Image], sizes: tuple[int, int]) -> None:
    """All images, in batches that are stacked view by view as a loader does."""
    chains = published_views(sizes)
    for first in range(0, len(stored), BATCH):
        views: list[list[Tensor]] = [[] for _ in chains]
        for entry in stored[first : first + BATCH]:
            image = open_image(entry)
            for view, chain in zip(views, chains, strict=True):
                changed: object = image
                for stage in chain.values():
                    changed = stage(changed)
                assert isinstance(changed, Tensor)
                view.append(changed)
        for view in views:
            torch.stack(view)


# opsin --------------------------------------------------------------------------------------------------------------


def crops(sizes: tuple[int, int]) -> dict[str, Crop]:
    large, small = sizes
    return {
        "global_1": RandomResizedCrop(size=large, scale=GLOBAL, interpolation="bicubic"),
        "global_2": RandomResizedCrop(size=large, scale=GLOBAL, interpolation="bicubic"),
        "local": RandomResizedCrop(size=small, scale=LOCAL, count=8, interpolation="bicubic"),
    }


def colours() -> dict[str, list[Augment]]:
    jitter, grey = ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grayscale(p=0.2)
    return {
        "global_1": [jitter, grey, GaussianBlur(p=1.0)],
        "global_2": [jitter, grey, GaussianBlur(p=0.1), Solarize(p=0.2)],
        "local": [jitter, grey, GaussianBlur(p=0.5)],
    }


def opsin_pass(images: Reader | Resident, sizes: tuple[int, int], *, finish: bool) -> None:
    """All images; small ones in batches of 256, which is what they are trained in."""
    views = Views(crops(sizes), colours())
    count = len(images.source) if isinstance(images, Reader) else len(images.images)
    facts = DataFacts(("a",), count, sizes[0], 3, MEAN, STD)
    finisher = _Finish(facts, seed=0, device=CPU, channels_last=False)
    for ids in torch.arange(count).split(BATCH if isinstance(images, Reader) else 256):
        raw = images.read(Task(views.crops, 0, ids))
        if finish:
            finisher(raw, 0, views, {})


# Stages -------------------------------------------------------------------------------------------------------------


def stage_rows(encoded: Sequence[bytes], *, rounds: int) -> list[list[str]]:
    """Each stage on all images at once, after the stages before it."""
    chains, wanted, ids = published_views((224, 96)), crops((224, 96)), torch.arange(len(encoded))
    source = Pictures(encoded)
    theirs: list[list[object]] = [[open_image(entry) for entry in encoded] for _ in chains]
    decoded = reader([source.read(index) for index in range(len(encoded))])
    raw = decoded.read(Task(wanted, 0, ids))
    ours = {name: [images.float() / 255 for images in view] for name, view in raw.views.items()}
    stages: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "decode": (
            lambda: [open_image(entry) for entry in encoded],
            lambda: [source.read(index) for index in range(len(encoded))],
        ),
        "crops": (partial(run_published, "crops", chains, theirs), lambda: decoded.read(Task(wanted, 0, ids))),
    }
    before = run_published("crops", chains, theirs)
    kinds = {"jitter": ColorJitter, "grey": Grayscale, "blur": GaussianBlur, "solarize": Solarize}
    for name, kind in kinds.items():
        stages[name] = (partial(run_published, name, chains, before), partial(run_opsin, kind, ours))
    stages["normalise"] = (partial(run_published, "normalise", chains, before), partial(normalise, raw))
    rows = []
    for name, (published, own) in stages.items():
        first, second = take_turns({"published": published, "opsin": own}, rounds=rounds, warmup=1)
        costs = [f"{timing.median_s / len(encoded) * 1e3:.3f}" for timing in (first, second)]
        rows.append([name, *costs, f"{second.speed_over(first):.1f}x"])
    return rows


def run_published(
    stage: str, chains: Sequence[dict[str, Callable[[object], object]]], images: Sequence[Sequence[object]]
) -> list[list[object]]:
    return [[chain[stage](image) for image in view] for chain, view in zip(chains, images, strict=True)]


def run_opsin(kind: type[Augment], views: dict[str, list[Tensor]]) -> None:
    for name, ops in colours().items():
        for op in ops:
            if isinstance(op, kind):
                for images in views[name]:
                    for part in images.split(num_cached(images)):
                        op(part, torch.rand(len(part), op.num_draws))


def normalise(raw: RawBatch) -> None:
    """From bytes, as without colour; the published stage begins with bytes as well."""
    normalize = Normalize(MEAN, STD, device=CPU)
    for view in raw.views.values():
        for images in view:
            normalize.bytes(images)


if __name__ == "__main__":
    main()
