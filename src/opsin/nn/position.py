"""Position embeddings for another grid than the one they were learned on.

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


def _interpolation(old: int, new: int, device: torch.device) -> Tensor:
    # Interpolation is linear: what it does to the unit vectors, as the columns of an image, is its matrix.
    units = torch.eye(old, device=device)[None, None]
    return F.interpolate(units, size=(new, old), mode="bicubic", antialias=True)[0, 0]
