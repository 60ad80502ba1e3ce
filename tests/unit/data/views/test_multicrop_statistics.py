"""Multi-crop views are distributed as those of a plain program for one image after the other.

The plain program follows the published rules of DINO with Python's `random`, Pillow and torchvision's
operations for PIL images. Draws are compared by the two-sample Kolmogorov-Smirnov distance, rates by the
binomial deviation. Seeds are fixed, so a test passes always or never; the limits are those that equal
distributions exceed about once in a thousand draws of the seeds.
"""

import colorsys
import math
import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from opsin.clock import seeding
from opsin.data.base import Augment, DataFacts, Views
from opsin.data.loading import _Finish
from opsin.data.views.colour import ColorJitter, GaussianBlur, Grayscale, Solarize
from opsin.data.views.crops import Boxes, RandomResizedCrop, boxes_for, cut
from opsin.data.workers import RawBatch
from tests.unit.data.pictures import pixels

COUNT = 4000
HEIGHT, WIDTH = 375, 500
GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)

JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8)
AUGMENT: dict[str, tuple[Augment, ...]] = {
    "global_1": (JITTER, Grayscale(p=0.2), GaussianBlur(p=1.0)),
    "global_2": (JITTER, Grayscale(p=0.2), GaussianBlur(p=0.1), Solarize(p=0.2)),
    "local": (JITTER, Grayscale(p=0.2), GaussianBlur(p=0.5)),
}
BLUR_RATE = {"global_1": 1.0, "global_2": 0.1, "local": 0.5}
SOLARIZE_RATE = {"global_1": 0.0, "global_2": 0.2, "local": 0.0}


def distance(first: list[float], second: list[float]) -> float:
    """The largest difference of the shares of values up to x, over all x."""
    values = torch.tensor(first + second, dtype=torch.float64).unique()
    shares = [
        torch.searchsorted(torch.tensor(sample, dtype=torch.float64).sort()[0], values, right=True) / len(sample)
        for sample in (first, second)
    ]
    return float((shares[0] - shares[1]).abs().max())


def limit(first: int, second: int) -> float:
    """Exceeded by equal distributions once in a thousand times: sqrt(-ln(0.001 / 2) / 2) = 1.95."""
    return 1.95 * math.sqrt(1 / first + 1 / second)


def check_distribution(ours: list[float], plain: list[float]) -> None:
    assert distance(ours, plain) < limit(len(ours), len(plain))


def check_rate(chosen: Tensor, expected: float) -> None:
    # 3.3 standard deviations: once in a thousand times. A rate of 0 or 1 is met exactly.
    deviation = math.sqrt(expected * (1 - expected) / len(chosen))
    assert abs(float(chosen.double().mean()) - expected) <= 3.3 * deviation


def draws(op: Augment, stream: str, count: int = COUNT) -> Tensor:
    return seeding.uniform(3, 0, torch.arange(count), stream, op.num_draws)


@cache
def placed(scale: tuple[float, float], copy: int = 0) -> Boxes:
    sides = torch.full((COUNT,), HEIGHT), torch.full((COUNT,), WIDTH)
    crop = RandomResizedCrop(size=96, scale=scale, interpolation="bicubic")
    return boxes_for(crop, *sides, seed=3, epoch=0, ids=torch.arange(COUNT), view="local", copy=copy)


def plain_box(rng: random.Random, height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width, by the published rule."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    return (height - h) // 2, (width - w) // 2, h, w


@cache
def plain_boxes(scale: tuple[float, float]) -> Tensor:
    rng = random.Random(1)
    return torch.tensor([plain_box(rng, HEIGHT, WIDTH, scale) for _ in range(COUNT)])


def area_shares(height: Tensor, width: Tensor) -> list[float]:
    return (height * width / (HEIGHT * WIDTH)).tolist()


def log_aspects(height: Tensor, width: Tensor) -> list[float]:
    return (width / height).log().tolist()


@pytest.mark.parametrize("scale", [GLOBAL, LOCAL])
def test_areas_shapes_and_places_of_crops_are_those_of_the_plain_rule(scale: tuple[float, float]) -> None:
    ours = placed(scale)
    top, left, height, width = plain_boxes(scale).unbind(1)
    check_distribution(area_shares(ours.height, ours.width), area_shares(height, width))
    check_distribution(log_aspects(ours.height, ours.width), log_aspects(height, width))
    check_distribution(ours.top.tolist(), top.tolist())
    check_distribution(ours.left.tolist(), left.tolist())
    check_rate(ours.flip, 0.5)


def test_other_ranges_of_areas_and_shapes_would_be_seen() -> None:
    ours = placed(LOCAL)
    rng = random.Random(2)
    other = torch.tensor([plain_box(rng, HEIGHT, WIDTH, (0.05, 0.35)) for _ in range(COUNT)])
    limits = limit(COUNT, COUNT)
    assert distance(area_shares(ours.height, ours.width), area_shares(other[:, 2], other[:, 3])) > limits
    evenly_by_ratio = [math.log(rng.uniform(3 / 4, 4 / 3)) for _ in range(COUNT)]
    assert distance(log_aspects(ours.height, ours.width), evenly_by_ratio) > limits


def test_copies_of_a_view_are_cut_independently() -> None:
    first, second = (torch.tensor(area_shares(placed(LOCAL, n).height, placed(LOCAL, n).width)) for n in (0, 1))
    # The correlation of independent draws has a standard deviation of 1 / sqrt(COUNT).
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 3.3 / math.sqrt(COUNT)
    check_rate(placed(LOCAL, 0).flip ^ placed(LOCAL, 1).flip, 0.5)


def coloured(op: Augment, colours: list[list[float]], stream: str = "local.0.0") -> Tensor:
    """Images of one row with the given colours, after the operation: [COUNT, 3, pixels]."""
    row = torch.tensor(colours).T[None, :, None].repeat(COUNT, 1, len(colours), 1)
    return op(row, draws(op, stream))[:, :, 0]


@pytest.mark.parametrize("strength", [0.2, 0.4])
def test_factors_of_brightness_contrast_and_saturation_are_even_in_their_range(strength: float) -> None:
    rng = random.Random(3)
    plain = [rng.uniform(1 - strength, 1 + strength) for _ in range(COUNT)]
    grey_pair, colour = [[0.4] * 3, [0.6] * 3], [[0.55, 0.5, 0.45]]
    factors = {
        "brightness": coloured(ColorJitter(brightness=strength), grey_pair)[:, 0, 0] / 0.4,
        "contrast": coloured(ColorJitter(contrast=strength), grey_pair).diff()[:, 0, 0] / 0.2,
        "saturation": coloured(ColorJitter(saturation=strength), colour)[:, :, 0].diff()[:, 1] / -0.05,
    }
    for factor in factors.values():
        # Recovered from differences of 0.05 between numbers that are rounded to 3e-8.
        assert factor.min() >= 1 - strength - 1e-5
        assert factor.max() <= 1 + strength + 1e-5
        check_distribution(factor.tolist(), plain)
    columns = torch.stack(list(factors.values()))
    assert (torch.corrcoef(columns) - torch.eye(3)).abs().max() < 3.3 / math.sqrt(COUNT)


def test_hues_are_turned_evenly_to_both_sides() -> None:
    start = [0.3, 0.6, 0.5]
    hue = colorsys.rgb_to_hsv(*start)[0]
    turned = coloured(ColorJitter(hue=0.1), [start])[:, :, 0]
    turns = [colorsys.rgb_to_hsv(*colour)[0] - hue for colour in turned.tolist()]
    rng = random.Random(4)
    assert max(map(abs, turns)) <= 0.1 + 1e-6
    check_distribution(turns, [rng.uniform(-0.1, 0.1) for _ in range(COUNT)])


@pytest.mark.parametrize("view", AUGMENT)
def test_jitter_grey_and_solarize_meet_their_shares_of_the_images(view: str) -> None:
    images = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.7, 0.3]]).T[:, None].repeat(COUNT, 1, 2, 1)
    changed = {
        type(op): (op(images, draws(op, f"{view}.0.{index}")) != images).any(3).any(2).any(1)
        for index, op in enumerate(AUGMENT[view])
    }
    check_rate(changed[ColorJitter], 0.8)
    check_rate(changed[Grayscale], 0.2)
    check_rate(changed[ColorJitter] & changed[Grayscale], 0.8 * 0.2)
    check_rate(changed.get(Solarize, torch.zeros(COUNT, dtype=torch.bool)), SOLARIZE_RATE[view])


@pytest.mark.parametrize("view", AUGMENT)
def test_blur_has_the_published_rate_and_widths(view: str) -> None:
    op = AUGMENT[view][2]
    points = torch.zeros(COUNT, 1, 13, 13)
    points[:, :, 6, 6] = 1
    row = op(points, draws(op, f"{view}.0.2"))[:, 0, 6].double()
    # Neighbours in a Gaussian differ by exp(-1 / (2 width ** 2)); at the smallest width still by 2e-22.
    blurred = row[:, 7] > 0
    check_rate(blurred, BLUR_RATE[view])
    widths = (-0.5 / (row[blurred, 7] / row[blurred, 6]).log()).sqrt()
    assert widths.min() >= 0.1 - 1e-5
    assert widths.max() <= 2 + 1e-3, "sixteen bits of a ratio near 1"
    rng = random.Random(5)
    check_distribution(widths.tolist(), [rng.uniform(0.1, 2.0) for _ in range(COUNT)])


def plain_view(rng: random.Random, picture: Image.Image, view: str, size: int) -> Image.Image:
    """The published pipeline up to normalisation."""
    top, left, height, width = plain_box(rng, picture.height, picture.width, LOCAL if view == "local" else GLOBAL)
    box = (left, top, left + width, top + height)
    image = picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    image = ImageOps.mirror(image) if rng.random() < 0.5 else image
    if rng.random() < 0.8:
        changes: list[Callable[[Image.Image], Image.Image]] = [
            lambda image: reference.adjust_brightness(image, rng.uniform(0.6, 1.4)),
            lambda image: reference.adjust_contrast(image, rng.uniform(0.6, 1.4)),
            lambda image: reference.adjust_saturation(image, rng.uniform(0.8, 1.2)),
            lambda image: reference.adjust_hue(image, rng.uniform(-0.1, 0.1)),
        ]
        rng.shuffle(changes)
        for change in changes:
            image = change(image)
    image = image.convert("L").convert("RGB") if rng.random() < 0.2 else image
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2))) if rng.random() < BLUR_RATE[view] else image
    return ImageOps.solarize(image) if rng.random() < SOLARIZE_RATE[view] else image


def our_views(picture: Image.Image, view: str, size: int, count: int) -> Tensor:
    stored = reference.pil_to_tensor(picture)
    crop = RandomResizedCrop(size=size, scale=LOCAL if view == "local" else GLOBAL, interpolation="bicubic")
    ids = torch.arange(count)
    sides = torch.full((count,), stored.shape[1]), torch.full((count,), stored.shape[2])
    boxes = boxes_for(crop, *sides, seed=0, epoch=0, ids=ids, view=view, copy=0)
    cuts = torch.stack([cut(stored, box, crop) for box in boxes.one_by_one()])
    facts = DataFacts(("a",), count, size, 3, (0.0,) * 3, (1.0,) * 3)
    finish = _Finish(facts, seed=0, device=torch.device("cpu"), channels_last=False)
    batch = finish(RawBatch({view: cuts[None]}, torch.zeros_like(ids), ids), 0, Views({view: crop}, AUGMENT), {})
    return batch.views[view][0]


@pytest.mark.parametrize("view", AUGMENT)
def test_finished_views_have_the_statistics_of_the_plain_pipeline(view: str) -> None:
    count, size = 1500, 24
    picture = Image.fromarray(pixels(48, 64))
    rng = random.Random(6)
    plain = torch.stack([reference.pil_to_tensor(plain_view(rng, picture, view, size)) / 255 for _ in range(count)])
    ours = our_views(picture, view, size, count)
    statistics: dict[str, Callable[[Tensor], Tensor]] = {
        "brightness": lambda images: images.mean((1, 2, 3)),
        "contrast": lambda images: images.std((1, 2, 3)),
        "colour": lambda images: images.std(1).mean((1, 2)),
        "edges": lambda images: images.diff(dim=3).abs().mean((1, 2, 3)),
        "red less blue": lambda images: (images[:, 0] - images[:, 2]).mean((1, 2)),
    }
    for of in statistics.values():
        check_distribution(of(ours).tolist(), of(plain).tolist())
