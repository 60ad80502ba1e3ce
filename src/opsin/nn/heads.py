"""Heads: from features to class scores, and to the unit vectors that DINO compares.

Shapes: B images, D width, K classes, d bottleneck.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """One linear layer on pooled features; `scale` multiplies the logits.

    Weights start from a normal distribution of deviation 0.02, the bias at zero.
    """

    def __init__(
        self, width: int, classes: int, *, dropout: float = 0.0, scale: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, classes, bias=bias)
        nn.init.normal_(self.linear.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features [B, D] to logits [B, K]."""
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits if self.scale == 1.0 else logits * self.scale


class Projector(nn.Module):
    """An MLP with GELU from features to unit vectors; the head of DINO before its prototypes.

    Caron et al. 2021, appendix C. Weights start from a normal distribution of deviation 0.02, biases at zero. The
    published code cuts it at 2, which is 100 deviations: no cut at all.
    """

    def __init__(self, width: int, *, hidden: int, bottleneck: int, layers: int) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for size, following in pairwise(sizes):
            layer = nn.Linear(size, following)
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
            parts += [layer, nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """Features [..., D] to unit vectors [..., d], in float32 or better."""
        vectors = self.mlp(features)
        return F.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)
