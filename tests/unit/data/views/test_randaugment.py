import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from opsin.clock import seeding
from opsin.data.views.randaugment import OPERATIONS, RandAugment
from tests.meta_device import watched
from tests.unit.data.pictures import pixels

SIGNS = {-1: 0.2, 1: 0.7}  # a draw for each
GEOMETRY = ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"]


def stored(side: int) -> Tensor:
    """uint8 [4, 3, S, S]: a picture, noise, few dark levels, and one colour."""
    noise = torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = torch.from_numpy(pixels(side, side)).permute(2, 0, 1)
    return torch.stack([picture, noise, noise // 16 + 20, torch.full_like(noise, 77)])


def floats(images: Tensor) -> Tensor:
    return images.float() / 255


def choose(operation: str, sign: int, count: int) -> Tensor:
    return torch.tensor([(OPERATIONS.index(operation) + 0.5) / len(OPERATIONS), SIGNS[sign]]).expand(count, 2)


def one_by_torchvision(image: Tensor, operation: str, sign: int, op: RandAugment, nudge: float = 0.0) -> Tensor:
    """uint8 [C, S, S] to float: torchvision's function for one image, with the magnitude its RandAugment would give.

    `nudge`, in pixels, is added to the point that shears and rotations leave where it is.
    """
    values = floats(image)
    middle = image.shape[-1] / 2 + nudge

    def magnitude(first: float, last: float) -> float:
        return float(torch.linspace(first, last, op.bins)[op.magnitude])

    def affine(*, shift: tuple[int, int] = (0, 0), slope: tuple[float, float] = (0, 0)) -> Tensor:
        moved: Tensor = reference.affine(
            values,
            angle=0.0,
            translate=list(shift),
            scale=1.0,
            shear=[math.degrees(math.atan(value)) for value in slope],
            interpolation=InterpolationMode(op.interpolation),
            fill=[op.fill],
            center=[nudge, nudge] if any(slope) else [middle, middle],
        )
        return moved

    slope, factor = sign * magnitude(0, 0.3), 1 + sign * magnitude(0, 0.9)
    shift = sign * int(magnitude(0, 150 / 331 * image.shape[-1]))
    bits = int((8 - torch.arange(op.bins) / ((op.bins - 1) / 4)).round()[op.magnitude])
    angle, interpolation = sign * magnitude(0, 30), InterpolationMode(op.interpolation)
    changes: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: values,
        "shear_x": lambda: affine(slope=(slope, 0)),
        "shear_y": lambda: affine(slope=(0, slope)),
        "translate_x": lambda: affine(shift=(shift, 0)),
        "translate_y": lambda: affine(shift=(0, shift)),
        "rotate": lambda: reference.rotate(
            values, angle, interpolation=interpolation, fill=[op.fill], center=[middle, middle]
        ),
        "brightness": lambda: reference.adjust_brightness(values, factor),
        "color": lambda: reference.adjust_saturation(values, factor),
        "contrast": lambda: reference.adjust_contrast(values, factor),
        "sharpness": lambda: reference.adjust_sharpness(values, factor),
        # On uint8: torchvision's posterize of floats has steps of 1 / 2 ** bits instead of whole levels of 255.
        "posterize": lambda: floats(reference.posterize(image, bits)),
        "solarize": lambda: reference.solarize(values, magnitude(1, 0)),
        "autocontrast": lambda: reference.autocontrast(values),
        "equalize": lambda: reference.equalize(values),
    }
    return changes[operation]()


def check_against_torchvision(op: RandAugment, operation: str, side: int, *, tolerance: float) -> None:
    images = stored(side)
    for sign in SIGNS:
        changed = op(floats(images), choose(operation, sign, len(images)))
        expected = torch.stack([one_by_torchvision(image, operation, sign, op) for image in images])
        if operation in GEOMETRY and op.interpolation == "nearest":
            # Half-way between two pixels either is right: torchvision's own choice differs between processors.
            for nudge in (-1e-3, 1e-3):
                other = torch.stack([one_by_torchvision(image, operation, sign, op, nudge) for image in images])
                expected = torch.where(changed == other, other, expected)
        torch.testing.assert_close(changed, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("magnitude", [0, 4, 9, 10, 20, 30])
@pytest.mark.parametrize("side", [32, 57])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_that_of_torchvision(operation: str, side: int, magnitude: int) -> None:
    """Magnitudes 4 and 20 shear to places half-way between pixels; 10 solarizes from a stored value on."""
    # Colours: some roundings of numbers up to 1, each 6e-8. The others copy pixels or levels.
    check_against_torchvision(RandAugment(1, magnitude), operation, side, tolerance=1e-6)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_that_of_torchvision_at_full_size(operation: str) -> None:
    check_against_torchvision(RandAugment(1, 9, fill=0.2), operation, 224, tolerance=1e-6)


@pytest.mark.parametrize("magnitude", [1, 9, 20, 30])
@pytest.mark.parametrize("side", [32, 57])
@pytest.mark.parametrize("operation", GEOMETRY)
def test_bilinear_moves_are_those_of_torchvision(operation: str, side: int, magnitude: int) -> None:
    # Coordinates up to 28 pixels, rounded to 3e-6 pixels; in noise, neighbours differ by up to 1.
    check_against_torchvision(RandAugment(1, magnitude, interpolation="bilinear"), operation, side, tolerance=1e-5)


def test_every_operation_has_an_equal_share_of_the_draws() -> None:
    images = floats(stored(12))[1:2]
    for index, operation in enumerate(OPERATIONS):
        middle = RandAugment(1)(images, choose(operation, 1, 1))
        for place in (0.001, 0.999):
            edge = torch.tensor([[(index + place) / len(OPERATIONS), SIGNS[1]]])
            assert torch.equal(RandAugment(1)(images, edge), middle)


@pytest.mark.parametrize("magnitude", range(31))
def test_a_stored_value_at_the_threshold_is_solarized(magnitude: int) -> None:
    """The threshold is 1 - magnitude / 30: for 10, 12 and others one of the 256 stored values exactly."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    changed = (RandAugment(1, magnitude)(floats(levels), choose("solarize", 1, 1)) * 255).round().long()
    expected = [255 - level if 30 * level >= 255 * (30 - magnitude) else level for level in range(256)]
    assert changed[0, 0].flatten().tolist() == expected


def test_layers_are_applied_in_turn() -> None:
    images = floats(stored(20))
    numbers = draws(RandAugment(3), len(images))
    in_turn = images
    for layer in numbers.split(2, dim=1):
        in_turn = RandAugment(1)(in_turn, layer)
    assert torch.equal(RandAugment(3)(images, numbers), in_turn)


# The second size is above what is changed at once.
@pytest.mark.parametrize("side", [20, 304])
def test_an_image_does_not_depend_on_its_company(side: int) -> None:
    images = floats(stored(side)).repeat(4, 1, 1, 1)
    numbers = draws(RandAugment(), len(images))
    alone = [RandAugment()(image[None], row[None]) for image, row in zip(images, numbers, strict=True)]
    # The mean of contrast may be summed in another order.
    torch.testing.assert_close(RandAugment()(images, numbers), torch.cat(alone), atol=1e-6, rtol=0)


def test_the_input_is_left_as_it_is_and_identity_keeps_bits() -> None:
    images = floats(stored(20))
    before = images.clone()
    numbers = choose("identity", 1, len(images)).clone()
    numbers[0] = choose("rotate", 1, 1)
    changed = RandAugment(1)(images, numbers)
    assert torch.equal(images, before)
    assert torch.equal(changed[1:], before[1:])
    assert not torch.equal(changed[0], before[0])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_values_stay_between_0_and_1(interpolation: str) -> None:
    images = floats(stored(20)).repeat(50, 1, 1, 1)
    op = RandAugment(4, 30, interpolation="nearest" if interpolation == "nearest" else "bilinear")
    changed = op(images, draws(op, len(images)))
    # Weights of bilinear and grey sum to 1 only within rounding.
    assert changed.min() >= -1e-6
    assert changed.max() <= 1 + 1e-6


def test_values_between_levels_are_lowered_to_a_level() -> None:
    ramp = torch.linspace(0, 1, 40 * 40).view(1, 1, 40, 40).expand(1, 3, 40, 40)
    for operation in ("posterize", "equalize"):
        levels = RandAugment(1)(ramp, choose(operation, 1, 1)) * 255
        # A level over 255 and times 255 again: rounded twice.
        torch.testing.assert_close(levels, levels.round(), atol=4e-5, rtol=0)
    # 9 of 30 leaves 7 bits: even levels up to 254.
    posterized = (RandAugment(1)(ramp, choose("posterize", 1, 1)) * 255).round()
    assert posterized.unique().tolist() == list(range(0, 256, 2))


def test_nothing_is_read_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values refuse every step that needs one on the host."""
    images = floats(stored(20)).to("meta")
    with watched(monkeypatch) as seen:
        assert RandAugment()(images, draws(RandAugment(), len(images))).shape == images.shape
    assert not seen.waits
    assert not seen.mixed


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gpu_gives_the_same_images(operation: str) -> None:
    images = floats(stored(57))
    for sign in SIGNS:
        numbers = choose(operation, sign, len(images))
        there = RandAugment(1)(images.cuda(), numbers).cpu()
        torch.testing.assert_close(there, RandAugment(1)(images, numbers), atol=1e-5, rtol=0)


def draws(op: RandAugment, count: int) -> Tensor:
    return seeding.uniform(0, 0, torch.arange(count), "augment", op.num_draws)
