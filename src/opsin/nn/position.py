"""Position embeddings: learned ones, interpolated to another grid, and fixed ones for any position.

Shapes: H, W the old grid, h, w the new one, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings [H, W, D], interpolated to [height, width, D] (bicubic, antialiased).

    Equals `F.interpolate` on the embedding, as two matrix products: the gradient of the latter is
    not deterministic on CUDA. Computed in float32, also under autocast.
    """
    with torch.autocast(grid.device.type, enabled=False):
        rows = _interpolation(grid.shape[0], height, grid.device)  # [h, H]
        columns = _interpolation(grid.shape[1], width, grid.device)  # [w, W]
        resized = torch.einsum("hi,ijd->hjd", rows, grid.float())
        return torch.einsum("wj,hjd->hwd", columns, resized).to(grid.dtype)


def sincos_positions(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Fixed embeddings [..., width] of positions in units of patches, float [...] each; `width` is a multiple of 4.

    Sine and cosine of the column at width / 4 wavelengths from 2 pi to 20,000 pi, then of the row (Vaswani et al.
    2017, section 3.5, in two dimensions as for MAE and I-JEPA). float32, computed in float64.
    """
    assert width % 4 == 0, f"width {width} is not a multiple of 4"
    exponents = torch.arange(width // 4, dtype=torch.float64, device=rows.device) / (width / 4)
    waves = torch.stack([columns, rows], -1).double()[..., None] / 10_000**exponents  # [..., 2, width / 4]
    return torch.stack([waves.sin(), waves.cos()], -2).flatten(-3).float()


def grid_positions(height: int, width: int, size: int, *, side: int = 1, device: torch.device | None = None) -> Tensor:
    """Fixed embeddings [height x width, size] of the centres of cells of `side` x `side` patches, row by row."""
    middle = (side - 1) / 2
    down, across = (torch.arange(count, device=device) * side + middle for count in (height, width))
    rows, columns = torch.meshgrid(down, across, indexing="ij")
    return sincos_positions(rows, columns, size).flatten(0, 1)


def _interpolation(old: int, new: int, device: torch.device) -> Tensor:
    # Interpolation is linear: the interpolated unit vectors, as columns of an image, are its matrix.
    units = torch.eye(old, device=device)[None, None]
    return F.interpolate(units, size=(new, old), mode="bicubic", antialias=True)[0, 0]
