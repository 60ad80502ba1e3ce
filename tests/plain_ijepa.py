"""I-JEPA's training step in plain torch, to compare a faster implementation with.

Written from the published recipe (Assran et al. 2023) with loops in place of clever tensors, and independent of
`opsin`. Everything keeps the dtype of the parameters; tests use float64.

The order within a step: set lr and weight decay, `PlainIJepa.loss`, backward, `plain_adamw` on the trained
parameters, `plain_ema` of the target encoder with the momentum of this step. No gradient is clipped.
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.plain_dino import gelu, plain_ema

# B images, h x w the grid of N patches, D width of the encoder, P of the predictor, E of one head, X tokens of a
# sequence, Kc context patches of an image, T target blocks of an image, Kt patches of a block


def plain_positions(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Fixed embeddings [..., width] of places in the grid, in units of patches; rows and columns may be fractions.

    Four equal parts: sin and cos of the column, then sin and cos of the row, each at the width / 4 frequencies
    10000^-(i / (width / 4)). Computed in float64 and rounded to float32, in which the published code keeps them.
    """
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4, as positions in two dimensions need; use one that is")
    parts = []
    for place in (columns, rows):
        for wave in (torch.sin, torch.cos):
            waves = [wave(place.double() * 10000.0 ** (-i / (width // 4))) for i in range(width // 4)]
            parts += [torch.stack(waves, dim=-1)]  # [..., width / 4]
    return torch.cat(parts, dim=-1).float()


def patch_positions(indices: Tensor, columns: int, width: int) -> Tensor:
    """Embeddings [..., width] of patches by their index: row by row on a grid of so many columns."""
    return plain_positions(indices // columns, indices % columns, width)


class PlainBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual path.

    Parameters come in the order, and have the shapes, of a block of timm's.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)  # rows: queries of all heads, keys of all heads, values of all heads
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Tokens [B, X, D] to [B, X, D]. No token looks at one whose `seen` [B, X] is False."""
        x = x + self.attention(self.norm1(x), seen)
        out: Tensor = x + self.fc2(gelu(self.fc1(self.norm2(x))))
        return out

    def attention(self, x: Tensor, seen: Tensor | None) -> Tensor:
        queries, keys, values = self.qkv(x).chunk(3, dim=2)  # [B, X, D] each
        size = x.shape[2] // self.heads
        mixed = []
        for head in range(self.heads):
            own = slice(head * size, (head + 1) * size)
            scores = queries[:, :, own] @ keys[:, :, own].transpose(1, 2) / math.sqrt(size)  # [B, X, X]
            if seen is not None:
                scores = scores.masked_fill(~seen[:, None, :], -math.inf)
            mixed.append(torch.softmax(scores, dim=2) @ values[:, :, own])  # [B, X, E]
        out: Tensor = self.proj(torch.cat(mixed, dim=2))
        return out


class PlainEncoder(nn.Module):
    """A vision transformer without class token, for images of any whole number of patches."""

    def __init__(self, patch_px: int, width: int, depth: int, heads: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.width = width
        self.patches = nn.Conv2d(channels, width, patch_px, stride=patch_px)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        plain_initialise(self)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Tokens [B, N, D] of all patches, or [B, K, D] of the patches with the indices `kept` [B, K]."""
        normed: Tensor = self.norm(self.after_blocks(images, len(self.blocks), kept))
        return normed

    def after_blocks(self, images: Tensor, count: int, kept: Tensor | None = None) -> Tensor:
        """Tokens as the first `count` blocks leave them, without the final norm."""
        x: Tensor = self.patches(images)  # [B, D, h, w]
        columns = x.shape[3]
        x = x.flatten(2).transpose(1, 2)  # [B, N, D]
        # All patches get their position, then the rest is dropped: the others never meet a block.
        x = x + patch_positions(torch.arange(x.shape[1], device=x.device), columns, self.width).to(x.dtype)
        if kept is not None:
            x = gather_tokens(x, kept)  # [B, K, D]
        for block in list(self.blocks)[:count]:
            x = block(x)
        return x


class PlainPredictor(nn.Module):
    """Tokens at places that the context encoder did not see, from those it saw."""

    def __init__(self, encoder_width: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))  # three dimensions: weight decay applies
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, encoder_width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        plain_initialise(self)

    def forward(
        self,
        tokens: Tensor,
        token_positions: Tensor,
        query_positions: Tensor,
        valid: Tensor | None = None,
        hints: Tensor | None = None,
    ) -> Tensor:
        """Predictions [B, Kt, D] for one block, from the context's `tokens` [B, Kc, D].

        The positions are [B, Kc, P] and [B, Kt, P]; `hints` [B, Kt, P] are added to the queries. Nothing looks at
        a query whose `valid` [B, Kt] is False: what stands there changes no other prediction.
        """
        x = self.embed(tokens) + token_positions.to(tokens.dtype)  # [B, Kc, P]
        queries = self.mask_token + query_positions.to(tokens.dtype)  # [B, Kt, P]
        if hints is not None:
            queries = queries + hints
        seen = None
        if valid is not None:
            seen = torch.cat([torch.ones_like(x[:, :, 0], dtype=torch.bool), valid], dim=1)  # [B, Kc + Kt]
        x = torch.cat([x, queries], dim=1)  # [B, Kc + Kt, P]
        for block in self.blocks:
            x = block(x, seen)
        predictions: Tensor = self.out(self.norm(x)[:, tokens.shape[1] :])
        return predictions


class PlainIJepa(nn.Module):
    """Context encoder, target encoder and predictor of I-JEPA; the target encoder starts as a copy."""

    def __init__(
        self,
        patch_px: int,
        width: int,
        depth: int,
        heads: int,
        predictor_width: int,
        predictor_depth: int,
        predictor_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = PlainEncoder(patch_px, width, depth, heads)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        # As published, the predictor has as many heads as the encoder, whatever its width.
        self.predictor = PlainPredictor(width, predictor_width, predictor_depth, predictor_heads or heads)

    def loss(self, images: Tensor, context: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Smooth L1 between predictions and targets: see `plain_smooth_l1` for the mean.

        `images` are [B, 3, S, S]; `context` [B, Kc] and `targets` [B, T, Kt] are indices of patches. `weights`
        [B, T, Kt] are 0 where an index is only padding: it then has no effect on loss or gradients.
        """
        return plain_smooth_l1(
            self.predictions(images, context, targets, weights), self.targets(images, targets), weights
        )

    def predictions(self, images: Tensor, context: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """[B, T, Kt, D]: each block predicted by a call of its own, from the same context."""
        columns = images.shape[3] // self.encoder.patch_px
        tokens = self.encoder(images, context)  # [B, Kc, D]
        places = patch_positions(context, columns, self.predictor.width)  # [B, Kc, P]
        predictions = []
        for t in range(targets.shape[1]):
            asked = patch_positions(targets[:, t], columns, self.predictor.width)  # [B, Kt, P]
            valid = None if weights is None else weights[:, t] > 0  # [B, Kt]
            predictions.append(self.predictor(tokens, places, asked, valid))  # [B, Kt, D]
        return torch.stack(predictions, dim=1)

    @torch.no_grad()
    def targets(self, images: Tensor, targets: Tensor) -> Tensor:
        """[B, T, Kt, D]: the whole image through the target encoder, each token normed, the blocks gathered."""
        normed = plain_layer_norm(self.target_encoder(images))  # [B, N, D]
        return torch.stack([gather_tokens(normed, targets[:, t]) for t in range(targets.shape[1])], dim=1)

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of context encoder and predictor, for `plain_adamw`."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def move_targets(self, momentum: float) -> None:
        """The target encoder moved towards the context encoder, after the optimizer's update."""
        plain_ema(self.target_encoder, self.encoder, momentum)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """[B, K, D]: of each image's `tokens` [B, N, D] those with its `indices` [B, K]."""
    return torch.stack([own[kept] for own, kept in zip(tokens, indices, strict=True)])


def plain_layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean 0 and variance 1 over the last dimension, by the biased variance and without weights."""
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = (centered**2).mean(dim=-1, keepdim=True)
    return centered / torch.sqrt(variance + eps)


def plain_smooth_l1(predictions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """d^2 / 2 where |d| < 1, else |d| - 1/2; averaged over images, blocks, patches and features alike.

    Both are [B, T, Kt, D]. With `weights` [B, T, Kt]: the mean over features, then the weighted mean over all
    patches of the batch together; an image with more valid patches counts for more.
    """
    distance = (predictions - targets).abs()
    elements = torch.where(distance < 1, distance**2 / 2, distance - 0.5)
    if weights is None:
        return elements.mean()
    patches = elements.mean(dim=-1)  # [B, T, Kt]
    return (weights * patches).sum() / weights.sum()


def plain_initialise(module: nn.Module) -> None:
    """As published: normal with deviation 0.02 within +-2, biases 0. No rescaling by depth takes effect."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


def plain_ijepa_lr(
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: int = 40,
    *,
    start: float = 2e-4,
    base: float = 1e-3,
    final: float = 1e-6,
    horizon_scale: float = 1.0,
) -> list[float]:
    """Learning rate of each step: linear from `start` to `base`, then half a cosine to `final`.

    The schedule moves before the update, so the first step is already one past `start`, and the last has `final`.
    `horizon_scale` is the published "ipe_scale": it stretches the whole schedule but neither the warm-up nor the
    training, which at 1.25 ends with the rate far above `final`. Released configurations have 1.0, the code 1.25.
    """
    warmup = warmup_epochs * steps_per_epoch
    rest = int(horizon_scale * epochs * steps_per_epoch) - warmup
    values = []
    for step in range(1, epochs * steps_per_epoch + 1):
        if step < warmup:
            values.append(start + (base - start) * step / warmup)
        else:
            values.append(_half_cosine(base, final, (step - warmup) / max(rest, 1)))
    return values


def plain_ijepa_weight_decay(
    epochs: int, steps_per_epoch: int, *, base: float = 0.04, final: float = 0.4, horizon_scale: float = 1.0
) -> list[float]:
    """Weight decay of each step; it too moves before the update: the last step has `final`."""
    horizon = int(horizon_scale * epochs * steps_per_epoch)
    return [_half_cosine(base, final, step / horizon) for step in range(1, epochs * steps_per_epoch + 1)]


def plain_ijepa_momentum(
    epochs: int, steps_per_epoch: int, *, base: float = 0.996, final: float = 1.0, horizon_scale: float = 1.0
) -> list[float]:
    """Momentum of the target encoder at each step: linear, the first step has `base`, the last not quite `final`."""
    horizon = int(horizon_scale * epochs * steps_per_epoch)
    return [base + (final - base) * step / horizon for step in range(epochs * steps_per_epoch)]


def _half_cosine(base: float, final: float, progress: float) -> float:
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * progress))
