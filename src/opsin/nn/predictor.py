"""The predictor of a JEPA: tokens of hidden patches from those of visible ones.

Assran et al. 2023 (I-JEPA), section 3 and appendix A.

Shapes: B images, M blocks of all images, Kc context tokens, Kt queries, D width of the encoder, P of the predictor.
"""

import torch
from torch import Tensor, nn

from opsin.nn.vit import Block, ViTConfig


class Predictor(nn.Module):
    """A narrow transformer over context tokens and one mask token for each query."""

    def __init__(self, encoder_width: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        config = ViTConfig(width=width, depth=depth, heads=heads)
        self.blocks = nn.ModuleList(Block(config, drop_path=0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, encoder_width)
        # The published code cuts this distribution at 100 deviations: no cut at all.
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, positions: Tensor, queries: Tensor, valid: Tensor | None = None) -> Tensor:
        """Predictions [M, Kt, D] from context tokens [B, Kc, D]; each context serves M / B consecutive blocks.

        `positions` [B, Kc, P] and `queries` [M, Kt, P] are position embeddings; queries may carry hints as well.
        A query whose `valid`, bool [M, Kt], is false changes no other prediction.
        """
        context = (self.embed(tokens) + positions).repeat_interleave(len(queries) // len(tokens), 0)  # [M, Kc, P]
        # Queries stand first, so that the last block can leave out the rest.
        x = torch.cat([(self.mask_token + queries).to(context.dtype), context], dim=1)
        seen = None if valid is None else torch.cat([valid, valid.new_ones(context.shape[:2])], dim=1)
        *first, last = self.blocks
        for block in first:
            x = block(x, None, seen)
        x = last(x, queries.shape[1], seen)
        predictions: Tensor = self.out(self.norm(x))
        return predictions
