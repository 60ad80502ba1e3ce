"""Predicts tokens at places that an encoder did not see, from those that it saw.

Assran et al. 2023 (I-JEPA), section 3 and appendix A.

Shapes: M contexts, Kc context tokens, Kt asked ones, D width of the encoder, P of the predictor.
"""

import torch
from torch import Tensor, nn

from opsin.nn.vit import Block, ViTConfig


class Predictor(nn.Module):
    """A narrow transformer over context tokens and one mask token for each place that is asked for."""

    def __init__(self, encoder_width: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        config = ViTConfig(width=width, depth=depth, heads=heads)
        self.blocks = nn.ModuleList(Block(config, drop_path=0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, encoder_width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, places: Tensor, asked: Tensor, valid: Tensor | None = None) -> Tensor:
        """Predictions [M, Kt, D] from the context's tokens [M, Kc, D].

        `places` [M, Kc, P] and `asked` [M, Kt, P] are position embeddings, the latter with whatever else is known.
        What stands where `valid`, bool [M, Kt], is false changes no other prediction.
        """
        context = self.embed(tokens) + places
        x = torch.cat([context, (self.mask_token + asked).to(context.dtype)], dim=1)
        seen = None
        if valid is not None:
            seen = torch.cat([valid.new_ones(context.shape[:2]), valid], dim=1)
        for block in self.blocks:
            x = block(x, None, seen)
        predictions: Tensor = self.out(self.norm(x[:, context.shape[1] :]))
        return predictions
