"""Interpolated position embeddings against torch's own interpolation."""

import pytest
import torch
from torch.nn import functional as F

from opsin.nn.position import resize_grid


@pytest.mark.parametrize("size", [(3, 3), (14, 9), (7, 7)])
def test_equals_interpolation_of_the_embedding(size: tuple[int, int]) -> None:
    grid = torch.randn(7, 7, 5)
    expected = F.interpolate(grid.permute(2, 0, 1)[None], size=size, mode="bicubic", antialias=True)
    # The same weighted sums in another order.
    torch.testing.assert_close(resize_grid(grid, *size), expected[0].permute(1, 2, 0), rtol=1e-5, atol=1e-5)


def test_stays_in_float32_under_autocast() -> None:
    grid = torch.randn(4, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = resize_grid(grid, 8, 8)
    assert torch.equal(inside, resize_grid(grid, 8, 8))
