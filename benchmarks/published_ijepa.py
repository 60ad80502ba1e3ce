"""I-JEPA's training step as published (Assran et al. 2023), in plain torch, to measure opsin's step against.

    PYTHONPATH=src python benchmarks/published_ijepa.py      sixty small steps on one repeated batch

It does what the published code does where that costs time or memory: positions copied for every image before
patches are gathered from them, one gather per mask and a concatenation, the context repeated for every target
block, attention weights written out, and a loop over parameters for the target encoder. `bf16` is torch.autocast
around both encoders, the predictor and the loss. One process only, hence no reduction over ranks; no gradient
scaler, which bf16 does not need; none of the published logging of gradient norms.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from published_dino import Block

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

# B images, N patches, D width of the encoder, P of the predictor, H heads, X tokens of a sequence, M context masks
# of Kc patches, T target masks of Kt patches


class Encoder(nn.Module):
    """Tokens of square images [B, 3, S, S]: of all patches [B, N, D], or of each mask's below another [M B, Kc, D]."""

    def __init__(self, image_px: int, patch_px: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch_px, stride=patch_px)
        self.positions = fixed_positions(image_px // patch_px, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        _initialise(self)

    def forward(self, images: Tensor, contexts: list[Tensor] | None = None) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # [B, N, D]
        x = x + self.positions
        if contexts is not None:
            x = gather_masks(x, contexts)  # [M B, Kc, D]
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.norm(x))


class Predictor(nn.Module):
    """Predictions [T M B, Kt, D] from the context's tokens [M B, Kc, D]."""

    def __init__(self, image_px: int, patch_px: int, encoder_width: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = fixed_positions(image_px // patch_px, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, encoder_width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        _initialise(self)

    def forward(self, tokens: Tensor, contexts: list[Tensor], targets: list[Tensor]) -> Tensor:
        images = len(tokens) // len(contexts)
        positions = self.positions.repeat(images, 1, 1)  # [B, N, P]
        x = self.embed(tokens) + gather_masks(positions, contexts)  # [M B, Kc, P]
        seen = x.shape[1]
        places = repeat_blocks(gather_masks(positions, targets), images, len(contexts))  # [T M B, Kt, P]
        queries = self.mask_token.repeat(places.shape[0], places.shape[1], 1) + places
        x = torch.cat([x.repeat(len(targets), 1, 1), queries], dim=1)  # [T M B, Kc + Kt, P]
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.out(self.norm(x)[:, seen:]))


@dataclass(frozen=True)
class StepSettings:
    """The values of the schedules at one step."""

    lr: float = 1e-3
    weight_decay: float = 0.04
    momentum: float = 0.996


_DEFAULT_SETTINGS = StepSettings()


class PublishedIJepa:
    """Both encoders, predictor and optimizer; `step` does one update of them all.

    The published networks have a predictor of width 384, with 6 blocks for ViT-B and L and 12 for ViT-H.
    """

    def __init__(
        self,
        image_px: int,
        patch_px: int,
        width: int,
        depth: int,
        heads: int,
        predictor_width: int,
        predictor_depth: int,
        *,
        precision: Precision = "fp32",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.device = torch.device(device)
        self.precision = precision
        self.encoder = Encoder(image_px, patch_px, width, depth, heads).to(self.device)
        self.predictor = Predictor(image_px, patch_px, width, predictor_width, predictor_depth, heads).to(self.device)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.encoder, self.predictor))

    def step(
        self,
        images: Tensor,
        contexts: list[Tensor],
        targets: list[Tensor],
        settings: StepSettings = _DEFAULT_SETTINGS,
    ) -> float:
        """The loss on `images` [B, 3, S, S] before the update it makes.

        `contexts` are indices [B, Kc] of the patches to see, `targets` [B, Kt] of those to predict: one tensor per
        mask, as `published_masks` gives them.

        Raises:
            FloatingPointError: the loss is not finite. The optimizer has then moved already, as published.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr
            if not group["is_plain"]:
                group["weight_decay"] = settings.weight_decay
        images = images.to(self.device, non_blocking=True)
        contexts = [mask.to(self.device, non_blocking=True) for mask in contexts]
        targets = [mask.to(self.device, non_blocking=True) for mask in targets]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            wanted = self.wanted(images, targets, len(contexts))  # [T M B, Kt, D]
            predicted = self.predictor(self.encoder(images, contexts), contexts, targets)
            loss = F.smooth_l1_loss(predicted, wanted)

        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for new, old in zip(self.encoder.parameters(), self.target_encoder.parameters(), strict=True):
                old.mul_(settings.momentum).add_((1 - settings.momentum) * new.detach())
        value = float(loss.item())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}; a step needs a finite one: lower the learning rate")
        return value

    @torch.no_grad()
    def wanted(self, images: Tensor, targets: list[Tensor], num_contexts: int) -> Tensor:
        """What the predictor should give, [T M B, Kt, D]: normed over features, then gathered."""
        tokens = self.target_encoder(images)  # [B, N, D]
        normed = F.layer_norm(tokens, (tokens.shape[2],))
        return repeat_blocks(gather_masks(normed, targets), len(images), num_contexts)


def gather_masks(tokens: Tensor, masks: list[Tensor]) -> Tensor:
    """[M B, K, D]: of `tokens` [B, N, D] those each mask [B, K] names, mask below mask."""
    gathered = []
    for mask in masks:
        indices = mask.unsqueeze(2).repeat(1, 1, tokens.shape[2])  # [B, K, D]
        gathered.append(torch.gather(tokens, dim=1, index=indices))
    return torch.cat(gathered)


def repeat_blocks(x: Tensor, images: int, times: int) -> Tensor:
    """[T times B, K, D] from [T B, K, D]: every run of B images so many times in a row."""
    return torch.cat([block for block in x.split(images) for _ in range(times)])


def fixed_positions(side: int, width: int) -> nn.Parameter:
    """Sine and cosine of column, then of row, [1, side^2, width]; not trained, but a parameter, as published."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies  # [side, width / 4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns = waves[None, :, :].expand(side, -1, -1)  # [side, side, width / 2]
    rows = waves[:, None, :].expand(-1, side, -1)
    table = torch.cat([columns, rows], dim=2).reshape(1, side * side, width).float()
    return nn.Parameter(table, requires_grad=False)


@dataclass(frozen=True)
class Masks:
    """Indices of patches: one context mask of [B, Kc], and target masks of [B, Kt] each."""

    contexts: list[Tensor]
    targets: list[Tensor]


def published_masks(batch: int, grid: tuple[int, int], seed: int, *, num_targets: int = 4, min_keep: int = 10) -> Masks:
    """Masks of a batch on a grid of rows x columns, image by image, with the biases of the published sampler.

    Blocks are of one size in the whole batch, one number deciding on scale and aspect; they never touch the last
    row or column; the context is cut to that of the image with fewest patches, first rows kept. A mask has more
    than `min_keep` patches.

    Raises:
        ValueError: no target block on this grid has that many.
    """
    generator = torch.Generator().manual_seed(seed)
    target_size = _block_size(grid, (0.15, 0.2), (0.75, 1.5), generator)
    context_size = _block_size(grid, (0.85, 1.0), (1.0, 1.0), generator)
    if target_size[0] * target_size[1] <= min_keep:
        raise ValueError(
            f"a target block of {target_size[0]} x {target_size[1]} patches on a grid of {grid[0]} x {grid[1]} "
            f"does not exceed min_keep {min_keep}; use a larger grid or a lower min_keep"
        )
    contexts: list[Tensor] = []
    targets: list[list[Tensor]] = [[] for _ in range(num_targets)]
    for _ in range(batch):
        allowed = []
        for blocks in targets:
            block = _place_block(grid, target_size, generator)
            allowed.append(~block)
            blocks.append(block.flatten().nonzero()[:, 0])
        contexts.append(_place_context(grid, context_size, allowed, min_keep, generator))
    shortest = min(len(context) for context in contexts)
    context = torch.stack([context[:shortest] for context in contexts])  # [B, Kc]
    return Masks([context], [torch.stack(blocks) for blocks in targets])


def _block_size(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], generator: torch.Generator
) -> tuple[int, int]:
    share = torch.rand(1, generator=generator).item()
    area = int(grid[0] * grid[1] * (scale[0] + share * (scale[1] - scale[0])))
    ratio = aspect[0] + share * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(height, grid[0] - 1), min(width, grid[1] - 1)


def _place_block(grid: tuple[int, int], size: tuple[int, int], generator: torch.Generator) -> Tensor:
    # The end of randint is exclusive: the last possible place is never drawn.
    top = int(torch.randint(0, grid[0] - size[0], (1,), generator=generator))
    left = int(torch.randint(0, grid[1] - size[1], (1,), generator=generator))
    block = torch.zeros(grid, dtype=torch.bool)
    block[top : top + size[0], left : left + size[1]] = True
    return block


def _place_context(
    grid: tuple[int, int], size: tuple[int, int], allowed: list[Tensor], min_keep: int, generator: torch.Generator
) -> Tensor:
    tries = 0
    while True:
        # After every 20 tries in vain one target fewer is kept out of the context.
        kept_out = max(len(allowed) - tries // 20, 0)
        block = _place_block(grid, size, generator)
        for region in allowed[:kept_out]:
            block = block & region
        indices = block.flatten().nonzero()[:, 0]
        if len(indices) > min_keep:
            return indices
        tries += 1


def _parameter_groups(*models: nn.Module) -> list[dict[str, object]]:
    decayed: list[dict[str, object]] = []
    plain: list[dict[str, object]] = []
    for model in models:
        named = list(model.named_parameters())
        is_plain = [name.endswith("bias") or parameter.ndim == 1 for name, parameter in named]
        yes = [parameter for (_, parameter), flag in zip(named, is_plain, strict=True) if flag]
        no = [parameter for (_, parameter), flag in zip(named, is_plain, strict=True) if not flag]
        decayed.append({"params": no, "is_plain": False})
        plain.append({"params": yes, "is_plain": True, "weight_decay": 0.0})
    return decayed + plain


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            assert module.bias is not None
            nn.init.zeros_(module.bias)


def main() -> None:
    for precision in PRECISIONS:
        ijepa = PublishedIJepa(64, 8, 64, 2, 2, 32, 2, precision=precision)
        images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        images = images + F.interpolate(images[:, :, ::32, ::32], size=(64, 64))
        masks = published_masks(16, (8, 8), seed=0, min_keep=4)
        losses = [ijepa.step(images, masks.contexts, masks.targets) for _ in range(60)]
        print(f"{precision}: loss {losses[0]:.4f}, {losses[-1]:.4f} after 60 steps on this batch")
        assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
