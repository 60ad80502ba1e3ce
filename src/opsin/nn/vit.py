"""A vision transformer that can also leave out patches and show its attention.

Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, with the parameter names, the arithmetic
and the initialisation of timm's: tests/unit/nn/test_vit.py compares them.

Shapes: B images, C channels, N patches, K kept patches, T tokens (class token and patches), D width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from opsin.errors import ConfigError
from opsin.nn.attention import Attention, Sizes, unpack
from opsin.nn.backbone import Backbone, ModelConfig, Tokens
from opsin.nn.position import grid_positions, resize_grid

_COMPILED = 64
"""Forms of a block that are compiled before others are computed as they are written."""


class ViTConfig(ModelConfig):
    """A vision transformer of any size; the defaults are ViT-Tiny/16."""

    name: Literal["vit"] = "vit"
    width: int = Field(192, ge=1)
    """Size of a token; a multiple of `heads`."""
    depth: int = Field(12, ge=1)
    """Number of blocks."""
    heads: int = Field(3, ge=1)
    """Attention heads of a block."""
    mlp_ratio: float = Field(4.0, gt=0.0)
    """Hidden size of a block's MLP, as a multiple of `width`."""
    patch: int = Field(16, ge=1)
    """Side of a patch in pixels; divides `data.image_size`."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of values that is dropped after the position embedding, after each attention and in each MLP."""
    attention_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of attention probabilities that is dropped."""
    drop_path: float = Field(0.0, ge=0.0, lt=1.0)
    """Probability that an image skips a residual branch of the last block; it grows linearly from 0 at the first."""
    class_token: bool = True
    """True if a learned token joins the patches."""
    pool: Literal["token", "mean"] = "token"
    """Features of the image: the class token, or the mean of the patches."""
    position: Literal["learned", "sincos"] = "learned"
    """Position embeddings: learned, or fixed sines and cosines of row and column."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ViTConfig":
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}; "
                f"use width {-(-self.width // self.heads) * self.heads} or change heads"
            )
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool 'token' needs class_token true; use pool 'mean'")
        if self.position == "sincos" and self.width % 4:
            raise ValueError(f"position 'sincos' needs a width that is a multiple of 4, not {self.width}")
        return self

    def build(self, *, image_size: int, channels: int = 3) -> "VisionTransformer":
        if image_size % self.patch:
            lower = image_size // self.patch * self.patch
            raise ConfigError(
                f"model.patch = {self.patch}: data.image_size {image_size} is not a multiple of it; "
                f"use data.image_size={lower or self.patch} or another patch"
            )
        return VisionTransformer(self, image_size=image_size, channels=channels)


class VisionTransformer(Backbone):
    """Patches and a class token through blocks of attention and MLP.

    Takes images of any size that is a multiple of the patch: the position embedding is interpolated.
    """

    def __init__(self, config: ViTConfig, *, image_size: int, channels: int) -> None:
        super().__init__()
        self.width = config.width
        self.image_size = image_size
        self.channels = channels
        self.num_blocks = config.depth
        self.patch = config.patch
        self.grid = image_size // config.patch
        self.pool_kind = config.pool
        self.prefix = int(config.class_token)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width)) if config.class_token else None
        self.sincos = config.position == "sincos"
        self.computed = frozenset({"pos_embed"} if self.sincos else ())
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.prefix + self.grid**2, config.width), requires_grad=not self.sincos
        )
        self.patch_embed = PatchEmbed(channels, config.patch, config.width)
        self.pos_drop = nn.Dropout(config.dropout)
        rates = torch.linspace(0.0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(config, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self._initialise()

    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, S, S] to features."""
        return self.forward_tokens(images)

    def pool(self, images: Tensor) -> Tensor:
        """[B, C, S, S] to the pooled features [B, D]."""
        return self.forward_tokens(images, class_token_only=self.pool_kind == "token").pooled

    def pool_sizes(self, images: Sequence[Tensor]) -> Tensor:
        # Layers that treat each token by itself treat the tokens of all sizes at once.
        if len(images) == 1:
            return self.pool(images[0])
        tokens = [self._embed(of_size, None) for of_size in images]
        sizes = [(len(part), part.shape[1]) for part in tokens]
        x = torch.cat([part.flatten(0, 1) for part in tokens])
        for block in self.blocks[:-1]:
            x = block(x, sizes=sizes)
        of_token = self.pool_kind == "token"
        return torch.cat([self._finish(part, class_token_only=of_token).pooled for part in unpack(x, sizes)])

    def checkpoint_blocks(self) -> bool:
        checkpoint_blocks(self)
        return True

    def compile_layers(self, backend: str) -> None:
        compile_blocks(self, backend)

    def layers(self) -> dict[str, int]:
        """Embeddings are layer 0, block i is layer i + 1, the last norm belongs to the last block."""
        depth = self.num_blocks
        return {
            name: int(name.split(".")[1]) + 1
            if name.startswith("blocks.")
            else depth
            if name.startswith("norm.")
            else 0
            for name, _ in self.named_parameters()
        }

    def forward_tokens(self, images: Tensor, keep: Tensor | None = None, *, class_token_only: bool = False) -> Tokens:
        """Features of some patches, or of the class token alone.

        With the indices `keep`, int64 [B, K], only these patches enter; `patches` is then [B, K, D] in
        their order. With `class_token_only`, the last block computes the class token alone, `pooled`
        stays the same, and `patches` is [B, 0, D].

        Raises:
            ValueError: `class_token_only` without `pool: token`.
        """
        if class_token_only and self.pool_kind != "token":
            raise ValueError(f"class_token_only needs pool 'token', not '{self.pool_kind}'")
        x = self._embed(images, keep)  # [B, T, D]
        for block in self.blocks[:-1]:
            x = block(x)
        return self._finish(x, class_token_only=class_token_only)

    def forward_depths(self, images: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """Patch tokens [B, N, D] after each of the numbers of blocks `depths`; after all blocks with the final norm."""
        left = self._left(images, depths)
        return [(self.norm(left[d]) if d == self.num_blocks else left[d])[:, self.prefix :] for d in depths]

    def pool_blocks(self, images: Tensor, blocks: int) -> Tensor:
        # Each with the final norm, as in the linear probes of DINO and I-JEPA.
        left = self._left(images, range(self.num_blocks - blocks + 1, self.num_blocks + 1))
        return torch.cat([self._read(self.norm(x)).pooled for x in left.values()], dim=1)

    def attention(self, images: Tensor) -> Tensor:
        """Attention of the last block, [B, heads, T, T], without dropout: a row for each token, of sum 1.

        Token 0 is the class token if the network has one; patches follow row by row.
        """
        x = self._embed(images, None)
        *first, last = self.blocks
        for block in first:
            x = block(x)
        assert isinstance(last, Block)
        return last.attn.probabilities(last.norm1(x))

    def _left(self, images: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
        """Tokens [B, T, D] after each of the numbers of blocks `depths`, in rising order."""
        x = self._embed(images, None)
        found: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks[: max(depths)], start=1):
            x = block(x)
            if number in depths:
                found[number] = x
        return found

    def _finish(self, x: Tensor, *, class_token_only: bool) -> Tokens:
        """The last block and the norm, for tokens [B, T, D] of one size."""
        return self._read(self.norm(self.blocks[-1](x, 1 if class_token_only else None)))

    def _read(self, x: Tensor) -> Tokens:
        """The features in tokens [B, T, D] after the norm."""
        patches = x[:, self.prefix :]
        return Tokens(x[:, 0] if self.pool_kind == "token" else patches.mean(dim=1), patches)

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        height, width = (side // self.patch for side in images.shape[-2:])
        positions = self.pos_embed[0, self.prefix :]  # [N, D]
        if (height, width) != (self.grid, self.grid):
            if self.sincos:
                positions = grid_positions(height, width, self.width, device=positions.device).to(positions.dtype)
            else:
                positions = resize_grid(positions.unflatten(0, (self.grid, -1)), height, width).flatten(0, 1)
        x = self.patch_embed(images, keep) + (positions if keep is None else positions[keep])
        if self.cls_token is not None:
            token = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([token.expand(len(x), -1, -1), x], dim=1)
        out: Tensor = self.pos_drop(x)
        return out

    def _initialise(self) -> None:
        if self.sincos:
            with torch.no_grad():
                self.pos_embed[0, self.prefix :] = grid_positions(self.grid, self.grid, self.width)
        else:
            # timm cuts this distribution at 100 deviations: no cut at all.
            nn.init.normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each to a token.

    `proj` has the parameters of a convolution. As a matrix product, omitted patches cost nothing.
    """

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images [B, C, S, S] to tokens [B, N, D], row by row, or [B, K, D] of the patches `keep`."""
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ConfigError(
                f"model.patch = {self.patch}: images of {height} x {width} pixels cannot be cut into such patches; "
                "use a multiple of the patch"
            )
        rows, columns = height // self.patch, width // self.patch
        cut = images.reshape(*images.shape[:2], rows, self.patch, columns, self.patch)  # [B, C, h, P, w, P]
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C P P]
        if keep is not None:
            patches = torch.take_along_dim(patches, keep[:, :, None], dim=1)  # [B, K, C P P]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Block(nn.Module):
    """Attention, then MLP; each normalised before and added to its input."""

    def __init__(self, config: ViTConfig, *, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        # The same for compiled code, in which a number would be a constant: each block would be compiled by itself.
        self.kept: Tensor | None
        self.register_buffer("kept", torch.tensor(1 - drop_path) if drop_path else None, persistent=False)
        self.checkpointing = False
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(
            config.width, config.heads, attention_dropout=config.attention_dropout, dropout=config.dropout
        )
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), dropout=config.dropout)

    def forward(
        self, x: Tensor, queries: int | None = None, seen: Tensor | None = None, sizes: Sizes | None = None
    ) -> Tensor:
        """Tokens [B, T, D] to [B, T, D], with `queries` and `seen` as for `Attention`.

        With `sizes`, packed tokens [M, D] to [M, D].
        """
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._compute, x, queries, seen, sizes, use_reentrant=False)
        return self._compute(x, queries, seen, sizes)

    def _compute(self, x: Tensor, queries: int | None, seen: Tensor | None, sizes: Sizes | None) -> Tensor:
        if sizes is not None:
            x = x + self._skip(self.attn.forward_packed(self.norm1(x), sizes), sizes)
        else:
            x = x[:, :queries] + self._skip(self.attn(self.norm1(x), queries, seen))
        return x + self._skip(self.mlp(self.norm2(x)), sizes)

    def _skip(self, branch: Tensor, sizes: Sizes | None = None) -> Tensor:
        """Drop the whole branch for some images, and scale it for the others to preserve its mean."""
        if self.kept is None or not self.training:
            return branch
        if sizes is None:
            return branch * self._draw(branch.new_empty(len(branch), 1, 1), self.kept)
        factors = [self._draw(branch.new_empty(images, 1), self.kept).expand(-1, t) for images, t in sizes]
        return branch * torch.cat([part.reshape(-1, 1) for part in factors])

    def _draw(self, empty: Tensor, share: Tensor) -> Tensor:
        """Fill with 0 or, for a `share` of the values, with its inverse."""
        if torch.compiler.is_compiling():
            return (torch.rand_like(empty, dtype=share.dtype) < share).div(share).to(empty.dtype)
        kept = 1.0 - self.drop_path
        return empty.bernoulli_(kept).div_(kept)


def checkpoint_blocks(module: nn.Module) -> None:
    """Compute each `Block` inside `module` once more in the backward pass, to save memory."""
    for block in module.modules():
        if isinstance(block, Block):
            block.checkpointing = True


def compile_blocks(module: nn.Module, backend: str) -> None:
    """Compile each `Block` inside `module` from its next call on; blocks of one shape share their code."""
    import torch._dynamo

    # All blocks of a method count together: widths, sizes of images, with and without gradients.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED)
    for block in module.modules():
        if isinstance(block, Block):
            block.compile(backend=backend)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        out: Tensor = self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return out
