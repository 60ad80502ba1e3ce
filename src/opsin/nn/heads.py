"""From features to class scores.

Shapes: B images, D width, K classes.
"""

from torch import Tensor, nn


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
