import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from opsin.data.base import Augment
from opsin.data.views.colour import (
    ColorJitter,
    Cutout,
    GaussianBlur,
    Grayscale,
    Normalize,
    RandomErasing,
    Solarize,
    exchange,
)
from tests.meta_device import watched

COUNT, SIDE = 24, 20

OPERATIONS: list[Augment] = [
    ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.5),
    Grayscale(p=0.5),
    GaussianBlur(p=0.5),
    Solarize(p=0.5),
    RandomErasing(p=0.5),
]


@pytest.fixture
def images() -> Tensor:
    """Values of stored images, with grey, black and white ones among them."""
    stored = torch.randint(0, 256, (COUNT, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).float()
    stored[0], stored[1] = 0, 255
    stored[2] = stored[2, :1]
    return stored / 255


def draws(op: Augment, *, seed: int = 1) -> Tensor:
    return torch.rand(COUNT, op.num_draws, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("op", "column", "expected"),
    [
        (ColorJitter(brightness=0.4), 1, reference.adjust_brightness),
        (ColorJitter(contrast=0.4), 2, reference.adjust_contrast),
        (ColorJitter(saturation=0.4), 3, reference.adjust_saturation),
    ],
)
def test_a_factor_acts_as_in_torchvision(images: Tensor, op: ColorJitter, column: int, expected: object) -> None:
    numbers = draws(op)
    changed = op(images, numbers)
    for index, image in enumerate(images):
        alone = expected(image, 0.6 + 0.8 * float(numbers[index, column]))  # type: ignore[operator]
        # A few roundings of numbers up to 1, each 6e-8.
        torch.testing.assert_close(changed[index], alone, atol=1e-6, rtol=0)


def test_hue_turns_as_in_torchvision(images: Tensor) -> None:
    op = ColorJitter(hue=0.5)
    numbers = draws(op)
    changed = op(images, numbers)
    for index, image in enumerate(images):
        alone = reference.adjust_hue(image, float(numbers[index, 4]) - 0.5)
        # The formulas divide the circle differently: hues of up to 6 sectors carry errors of 6 * 6e-8 and more.
        torch.testing.assert_close(changed[index], alone, atol=5e-6, rtol=0)


def test_jitter_is_brightness_then_contrast_then_saturation_then_hue(images: Tensor) -> None:
    op = ColorJitter(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    numbers = draws(op)
    in_turn = images
    for part in (ColorJitter(0.4), ColorJitter(contrast=0.3), ColorJitter(saturation=0.2), ColorJitter(hue=0.1)):
        in_turn = part(in_turn, numbers)
    assert torch.equal(op(images, numbers), in_turn)


def test_grayscale_is_that_of_torchvision(images: Tensor) -> None:
    changed = Grayscale(p=1.0)(images, draws(Grayscale()))
    torch.testing.assert_close(changed, reference.rgb_to_grayscale(images, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [16, 48])
@pytest.mark.parametrize("way", [GaussianBlur._multiply, GaussianBlur._convolve])
def test_blur_is_that_of_torchvision(way: Callable[[GaussianBlur, Tensor, Tensor], Tensor], side: int) -> None:
    """Both ways, also where the image is one tile."""
    images = torch.rand(COUNT, 3, side, side, generator=torch.Generator().manual_seed(0))
    op = GaussianBlur(p=1.0, sigma=(0.1, 2.0))
    numbers = draws(op)
    changed = way(op, images, numbers)
    for index, image in enumerate(images):
        width = 0.1 + 1.9 * float(numbers[index, 1])
        alone = reference.gaussian_blur(image, [2 * op.radius(side) + 1] * 2, [width, width])
        # Sums of 13 * 13 products in another order.
        torch.testing.assert_close(changed[index], alone, atol=2e-6, rtol=0)


def test_blur_keeps_to_an_image_that_is_smaller_than_its_kernel() -> None:
    tiny = torch.rand(2, 3, 4, 4)
    assert GaussianBlur(p=1.0)(tiny, torch.full((2, 2), 0.9)).shape == tiny.shape


def test_solarize_is_that_of_torchvision(images: Tensor) -> None:
    changed = Solarize(p=1.0, threshold=0.4)(images, draws(Solarize()))
    assert torch.equal(changed, reference.solarize(images, 0.4))


def test_erasing_fills_one_rectangle_of_the_asked_size() -> None:
    images = torch.zeros(2000, 1, 40, 40)
    op = RandomErasing(p=1.0, scale=(0.1, 0.2), fill=0.5)
    erased = op(images, torch.rand(2000, op.num_draws, generator=torch.Generator().manual_seed(0))) == 0.5
    rows, columns = erased.any(3).sum((1, 2)), erased.any(2).sum((1, 2))
    area = erased.sum((1, 2, 3))
    assert torch.equal(area, rows * columns)
    # 160 to 320 pixels, with sides of 7 to 32 that are rounded to whole ones.
    assert area.min() > 145
    assert area.max() < 345
    reached = erased[:, 0].any(0)
    assert reached.any(0).all()
    assert reached.any(1).all()


def test_erasing_is_that_of_torchvision_for_the_first_rectangle_that_fits(images: Tensor) -> None:
    op = RandomErasing(p=0.7, scale=(0.1, 0.9), ratio=(0.3, 3.3), fill=0.25)
    numbers = draws(op)
    erased = op(images, numbers)
    later = 0
    for index, (chosen, top, left, *rest) in enumerate(numbers.double().tolist()):
        sizes = []
        for area, shape in zip(rest[:10], rest[10:], strict=True):
            pixels = SIDE**2 * (0.1 + 0.8 * area)
            ratio = math.exp(math.log(0.3) + shape * (math.log(3.3) - math.log(0.3)))
            sizes.append((round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))))
        height, width = next((h, w) for h, w in sizes if 0 < h <= SIDE and 0 < w <= SIDE)
        later += (height, width) != sizes[0]
        if chosen >= 0.7:
            height = 0
        i, j = int(top * (SIDE - height + 1)), int(left * (SIDE - width + 1))
        alone = reference.erase(images[index], i, j, height, width, torch.tensor(0.25))
        assert torch.equal(erased[index], alone)
    assert later, "every first proposal fits"


def test_cutout_fills_a_square_that_may_lie_partly_outside() -> None:
    images = torch.zeros(2000, 3, 16, 16)
    filled = Cutout(size_px=6)(images, torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))) == 0.5
    sides = filled[:, 0].any(2).sum(1)
    assert (int(sides.min()), int(sides.max())) == (3, 6)
    assert torch.equal(filled[:, 0], filled[:, 2])


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: type(op).__name__)
def test_images_that_are_passed_over_keep_their_bits(images: Tensor, op: Augment) -> None:
    numbers = draws(op)
    before = images.clone()
    changed = op(images, numbers)
    missed = numbers[:, 0] >= 0.5
    assert 5 < int(missed.sum()) < COUNT - 5
    assert torch.equal(changed[missed], before[missed])
    assert not torch.equal(changed[~missed], before[~missed])
    assert torch.equal(images, before), "the operation writes into its input"


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: type(op).__name__)
@pytest.mark.parametrize("side", [16, 96, 20, 13, 33])
def test_an_image_does_not_depend_on_its_company(side: int, op: Augment) -> None:
    images = torch.rand(COUNT, 3, side, side, generator=torch.Generator().manual_seed(0))
    numbers = draws(op)
    whole = op(images, numbers)
    alone = [op(image[None], row[None]) for image, row in zip(images, numbers, strict=True)]
    assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: type(op).__name__)
def test_nothing_is_read_back_from_the_device(op: Augment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values refuse every step that needs one on the host."""
    images = torch.empty(COUNT, 3, SIDE, SIDE, device="meta")
    with watched(monkeypatch) as seen:
        assert op(images, draws(op)).shape == images.shape
    assert not seen.waits
    assert not seen.mixed


def test_rows_are_exchanged_by_gathering_them() -> None:
    old, new, index = torch.arange(9.0), -torch.arange(1.0, 4), torch.tensor([2, 3, 7])
    assert torch.equal(torch.cat([old, new])[exchange(index, 9)], old.index_copy(0, index, new))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: type(op).__name__)
def test_a_gpu_gives_the_same_images(images: Tensor, op: Augment) -> None:
    numbers = draws(op)
    there = op(images.cuda(), numbers).cpu()
    # A GPU may convolve in TF32, whose numbers have eleven bits.
    tolerance = 2e-3 if isinstance(op, GaussianBlur) else 1e-5
    torch.testing.assert_close(there, op(images, numbers), atol=tolerance, rtol=0)


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: type(op).__name__)
def test_values_stay_between_0_and_1(images: Tensor, op: Augment) -> None:
    changed = op(images, draws(op))
    # The weights of grey and blur sum to 1 only within rounding.
    assert changed.min() >= -1e-6
    assert changed.max() <= 1 + 1e-6


def test_normalising_bytes_and_floats_gives_mean_0_and_deviation_1() -> None:
    stored = torch.randint(0, 256, (4, 3, 50, 50), dtype=torch.uint8)
    stored[:, 1] //= 2
    values = stored.double() / 255
    mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3))
    normalize = Normalize(tuple(mean.tolist()), tuple(std.tolist()), device=torch.device("cpu"))
    expected = (values - mean[:, None, None]) / std[:, None, None]
    for result in (normalize.bytes(stored), normalize(stored.float() / 255)):
        assert result.dtype == torch.float32
        # Products up to 3.5 rounded to float32, twice.
        torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=0)
