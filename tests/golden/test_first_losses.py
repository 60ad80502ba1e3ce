"""The first losses of the shipped recipes stay as they are. How to renew them: first_losses.py."""

import json

import pytest

from opsin.run.recipe import shipped
from tests.golden.first_losses import FILE, NEEDS_COLOUR, STEPS, VARIANTS, first_losses

# Ten updates carry the roundings of another chip or build of torch to 3e-4 of a loss at most where batch norm amplifies
# them, to 1e-5 elsewhere (measured without AVX, with AVX2 and two threads, with torch 2.11). A changed
# draw, another image or a lost factor moves it by a hundredth and more.
TOLERANCE = 1e-3


@pytest.mark.usefixtures("torch_switches")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_first_losses_are_the_golden_ones(name: str, request: pytest.FixtureRequest) -> None:
    golden = json.loads(FILE.read_text())[name]
    assert len(golden) == STEPS
    data = request.getfixturevalue("test_data") / "cifar10" if name in NEEDS_COLOUR else "digits"
    assert first_losses(name, data) == pytest.approx(golden, rel=TOLERANCE)


def test_every_shipped_recipe_has_golden_losses() -> None:
    assert sorted(VARIANTS) == sorted(json.loads(FILE.read_text())) == sorted(p.stem for p in shipped.glob("*.yaml"))
