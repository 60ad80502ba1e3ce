"""Self-attention, and the choice of how it is computed.

Shapes: B images, T tokens, Q queries, H heads, E width of a head, D = H x E. Images of several sizes are packed:
their tokens follow each other in [M, D], and `Sizes` counts the images and their tokens.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AttentionKind = Literal["fused", "explicit"]
Sizes = Sequence[tuple[int, int]]
"""(B, T) of each size of image, in the order of a packed tensor."""


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names.

    `fused_attn`, also timm's name, selects the kernel: see `set_attention`.
    """

    def __init__(self, width: int, heads: int, *, attention_dropout: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.attention_dropout = attention_dropout
        self.fused_attn = True
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, queries: int | None = None, seen: Tensor | None = None) -> Tensor:
        """Tokens [B, T, D] to [B, T, D]; with `queries`, only the first Q tokens are computed: [B, Q, D].

        A token whose `seen`, bool [B, T], is false changes no other token.
        """
        q, k, v = self._project(x, queries)
        mask = None if seen is None else seen[:, None, None]
        out: Tensor = self.proj_drop(self.proj(self._mix(q, k, v, mask)))
        return out

    def forward_packed(self, x: Tensor, sizes: Sizes) -> Tensor:
        """Packed tokens [M, D] to [M, D]; tokens attend to those of their own image."""
        mixed = [self._mix(*self._split(part, 3)).flatten(0, 1) for part in unpack(self.qkv(x), sizes)]
        out: Tensor = self.proj_drop(self.proj(torch.cat(mixed)))
        return out

    def probabilities(self, x: Tensor) -> Tensor:
        """Attention of each token, a row, to each token: [B, H, T, T], rows sum to 1, without dropout."""
        q, k, _ = self._project(x, None)
        return self._probabilities(q, k)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Values [B, H, T, E], averaged by the attention of each query [B, H, Q, E]: [B, Q, D]."""
        if self.fused_attn:
            rate = self.attention_dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        else:
            mixed = F.dropout(self._probabilities(q, k, mask), self.attention_dropout, self.training) @ v
        return mixed.transpose(1, 2).flatten(2)

    def _probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        scores: Tensor = (q * self.scale) @ k.transpose(-2, -1)  # [B, H, Q, T]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1)

    def _project(self, x: Tensor, queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, Q, E], keys and values [B, H, T, E]."""
        if queries is None:
            q, k, v = self._split(self.qkv(x), 3)
            return q, k, v
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = self._split(F.linear(x[:, :queries], weight[:width], bias[:width]), 1)
        k, v = self._split(F.linear(x, weight[width:], bias[width:]), 2)
        return q, k, v

    def _split(self, x: Tensor, parts: int) -> Sequence[Tensor]:
        """[B, T, parts x D] to `parts` times [B, H, T, E]."""
        return x.reshape(*x.shape[:2], parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def unpack(x: Tensor, sizes: Sizes) -> list[Tensor]:
    """Packed tokens [M, D] as one [B, T, D] for each size."""
    parts = x.split([images * tokens for images, tokens in sizes])
    return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]


def set_attention(module: nn.Module, kind: AttentionKind) -> int:
    """Compute every attention inside `module` by `kind`; return the number of attention layers.

    `explicit` is softmax and matrix products, `fused` is `F.scaled_dot_product_attention`. Our layers
    and timm's both have the attribute `fused_attn`.
    """
    layers = [layer for layer in module.modules() if isinstance(getattr(layer, "fused_attn", None), bool)]
    for layer in layers:
        setattr(layer, "fused_attn", kind == "fused")  # noqa: B010 - the attribute is known at run time only
    return len(layers)


def choose_attention(device: torch.device, precision: str) -> tuple[AttentionKind, str]:
    """The faster kind on `device` at `precision` (fp32, bf16 or fp16), and the reason."""
    if device.type == "cpu":
        return "explicit", f"on a CPU in {precision}, matrix products are at least as fast as the fused kernel"
    return "fused", f"{device.type} has a fused kernel that never stores the attention matrix"
