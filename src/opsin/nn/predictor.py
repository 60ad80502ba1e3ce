"""Predicts tokens at places that an encoder did not see, from those that it saw.

Assran et al. 2023 (I-JEPA), section 3 and appendix A.

Shapes: B images, M blocks of all of them, Kc context tokens, Kt asked ones, D width of the encoder, P of the predictor.
"""

import torch
from torch import Tensor, nn

from opsin.nn.vit import Block, ViTConfig, run_block


class Predictor(nn.Module):
    """A narrow transformer over context tokens and one mask token for each place that is asked for."""

    def __init__(self, encoder_width: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.checkpointing = False
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
        """Predictions [M, Kt, D] from contexts of tokens [B, Kc, D], each for M / B blocks one after the other.

        `places` [B, Kc, P] and `asked` [M, Kt, P] are position embeddings, the latter with whatever else is known.
        What stands where `valid`, bool [M, Kt], is false changes no other prediction.
        """
        context = (self.embed(tokens) + places).repeat_interleave(len(asked) // len(tokens), 0)  # [M, Kc, P]
        # What is asked for stands first, so that the last block can leave out the rest.
        x = torch.cat([(self.mask_token + asked).to(context.dtype), context], dim=1)
        seen = None
        if valid is not None and not _all_on_host(valid):
            seen = torch.cat([valid, valid.new_ones(context.shape[:2])], dim=1)
        *first, last = self.blocks
        for block in first:
            x = run_block(block, x, None, seen, twice=self.checkpointing)
        x = run_block(last, x, asked.shape[1], seen, twice=self.checkpointing)
        predictions: Tensor = self.out(self.norm(x))
        return predictions


def _all_on_host(valid: Tensor) -> bool:
    """Whether all are true, where asking costs nothing: a GPU would have to be waited for."""
    return valid.device.type == "cpu" and bool(valid.all())
