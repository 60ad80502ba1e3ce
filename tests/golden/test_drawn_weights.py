"""Starting weights follow from the seed alone, whatever the chip and the version of torch."""

import json

import pytest
import torch

from tests.golden.drawn_weights import FILE, VARIANTS, drawn_weights

# One rounding of float32 in the logarithm or cosine of a normal draw differs between kernels.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, [1.5409960746765137, -0.293428897857666, -2.1787893772125244]),
        (16, [-1.1258398294448853, -1.152360200881958, -0.2505785822868347]),
        (100, [-1.1258398294448853, -1.152360200881958, -0.2505785822868347]),
    ],
)
def test_normal_numbers_of_torch_are_those_of_every_version(count: int, expected: list[float]) -> None:
    torch.manual_seed(0)
    assert torch.empty(count).normal_()[:3].tolist() == pytest.approx(expected, rel=TOLERANCE)


def test_even_numbers_of_torch_are_those_of_every_version() -> None:
    torch.manual_seed(0)
    assert torch.empty(100).uniform_()[:3].tolist() == [0.49625658988952637, 0.7682217955589294, 0.08847743272781372]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_drawn_weights_are_the_golden_ones(name: str) -> None:
    # Draws of deviation 0.02 are exact to 1e-8, also where they are close to zero.
    assert drawn_weights(name) == pytest.approx(json.loads(FILE.read_text())[name], rel=TOLERANCE, abs=1e-8)
