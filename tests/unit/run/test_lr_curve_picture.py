"""The picture of a sweep, for every kind of curve."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from opsin.run.lr_curve import draw_curve, read_curve, sweep_rates

RATES = sweep_rates(1e-5, 1.0, 100)
Pixels = NDArray[np.uint8]
GREEN, RED = (0, 158, 115), (213, 94, 0)


def falling(rate: float) -> float:
    return 0.7 + 1.6 / (1 + (rate / 1e-3) ** 2) + 50 * max(0.0, rate - 0.05)


def picture(losses: list[float], *, stopped: bool = False, name: str = "quickstart") -> Pixels:
    rates = RATES[: len(losses)]
    png = draw_curve(name, rates, losses, read_curve(rates, losses, stopped=stopped))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def column_of(pixels: Pixels, colour: tuple[int, int, int]) -> int | None:
    """The column that has this colour over more than half of its height: an upright line."""
    share = (np.abs(pixels.astype(int) - colour).sum(2) < 60).mean(0)
    return int(share.argmax()) if share.max() > 0.35 else None


def test_suggestion_and_safe_rate_are_marked_in_their_order() -> None:
    pixels = picture([falling(rate) for rate in RATES])
    suggestion, safe = column_of(pixels, GREEN), column_of(pixels, RED)
    assert suggestion is not None
    assert safe is not None
    assert suggestion < safe


def test_a_curve_without_a_slope_has_no_suggestion_in_its_picture() -> None:
    pixels = picture([2.3 + 0.01 * (-1) ** step for step in range(100)])
    assert column_of(pixels, GREEN) is None


@pytest.mark.parametrize("losses", [[], [2.3], [2.3, 1e30], [0.0] * 100])
def test_any_losses_can_be_drawn(losses: list[float]) -> None:
    pixels = picture(losses, stopped=len(losses) < 100, name="50 % of $x, $y")
    assert pixels.shape[2] == 3
    assert len(np.unique(pixels)) > 2


def test_drawing_needs_no_window(tmp_path: Path) -> None:
    code = (
        "import sys; from opsin.run.lr_curve import draw_curve, read_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        "draw_curve('name', [1, 2], [1, 2], read_curve([1, 2], [1, 2], stopped=True))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    source = Path(__file__).resolve().parents[3] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(source), "HOME": str(tmp_path)}, check=False
    )
    assert done.returncode == 0
