"""I-JEPA: features of hidden blocks of an image are predicted from the visible patches around them.

Assran et al. 2023, https://arxiv.org/abs/2301.08243. The published settings are the recipe `ijepa-imagenet-vith14`.

Shapes: B images of a part, S side in pixels, N patches, Kc context patches, T target blocks of C cells (patches
here), D width of the encoder, P of a predictor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.profiler import record_function

from opsin.clock.schedule import cosine, linear
from opsin.data.views.crops import RandomResizedCrop
from opsin.data.views.masks import MaskConfig
from opsin.errors import ConfigError
from opsin.methods.base import Batch, Clock, DataFacts, Losses, Method, MethodConfig, ParamGroup, Views, split_by_decay
from opsin.nn.backbone import Backbone, ModelConfig
from opsin.nn.ema import ema_decay, follow
from opsin.nn.position import grid_positions
from opsin.nn.predictor import Predictor
from opsin.nn.vit import VisionTransformer, ViTConfig, checkpoint_blocks, compile_blocks
from opsin.settings.family import Range, Settings


class JepaViews(Settings):
    """The crop of a training image; its colours stay unchanged."""

    scale: Range = (0.3, 1.0)
    """Share of the image's area in a crop, from and to."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation when a crop is resized."""
    flip: Literal["none", "random"] = "none"
    """Mirroring left to right: never, or with probability 0.5."""

    def build(self, image_size: int) -> RandomResizedCrop:
        """The crop of the view `image`."""
        return RandomResizedCrop(size=image_size, scale=self.scale, interpolation=self.interpolation, flip=self.flip)


class IJepaConfig(MethodConfig):
    """Prediction of hidden features."""

    published: ClassVar[str | None] = "ijepa-imagenet-vith14"
    name: Literal["ijepa"] = "ijepa"
    predictor_width: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Size of a token in the predictor, a multiple of 4 and its heads; `auto` is half the encoder's, up to 384."""
    predictor_depth: int = Field(6, gt=0)
    """Blocks of the predictor."""
    predictor_heads: int | None = Field(None, gt=0)
    """Attention heads of the predictor; null takes the number of the encoder."""
    momentum: float = Field(0.996, ge=0, le=1)
    """Share of the target encoder that remains after `momentum_batch_size` images, at the start; it ends at 1."""
    momentum_shape: Literal["linear", "cosine"] = "linear"
    """Shape of the rise of the momentum."""
    momentum_warmup: bool = False
    """Begin with a smaller momentum, (1 + step) / (10 + step), to forget the first weights soon."""
    momentum_batch_size: int = Field(2048, gt=0)
    """Batch size of the momentum in images; batches of another size keep the same share per image."""
    norm_targets: bool = True
    """Scale each target to mean 0 and variance 1; otherwise features may shrink to 0."""
    masks: MaskConfig = MaskConfig()
    """Masks of hidden and visible patches."""
    views: JepaViews = JepaViews()
    """Crops of the training images."""

    def build(self, model: ModelConfig, facts: DataFacts) -> "IJepa":
        return IJepa(self, encoder_config(self.name, model), facts)


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of the target blocks, on a grid of cells of `side` x `side` patches."""

    indices: Tensor
    """int64 [B, T, C], row by row on that grid."""
    valid: Tensor
    """bool [B, T, C]: false for the padding of a block with fewer cells."""
    side: int
    padded: bool = True
    """False if all cells are valid: attention without a mask is faster."""

    @classmethod
    def of(cls, masks: Mapping[str, Tensor]) -> "Cells":
        """The patches of the target blocks in `masks`."""
        targets, valid = masks["targets"], masks.get("target_valid")
        if valid is None:
            return cls(targets, torch.ones_like(targets, dtype=torch.bool), 1, padded=False)
        return cls(targets, valid, 1)

    def positions(self, patches: int, width: int) -> Tensor:
        """Position embeddings [B, T, C, width] of the centres; the image is `patches` wide."""
        across = patches // self.side
        return grid_positions(across, across, width, side=self.side, device=self.indices.device)[self.indices]

    def gather(self, values: Tensor) -> Tensor:
        """[B, T, C, D]: the values of these cells, from those of all cells [B, N, D]."""
        flat = torch.take_along_dim(values, self.indices.flatten(1)[..., None], dim=1)
        return flat.view(*self.indices.shape, -1)


@dataclass(frozen=True, slots=True)
class Level:
    """Predictions on one grid, and their targets."""

    cells: Cells
    raw: Tensor
    """[B, n x n, D]: the output of the target encoder for every cell."""
    predictions: Tensor
    """[B, T, C, D]"""
    targets: Tensor
    """[B, T, C, D]"""

    def errors(self) -> Tensor:
        """[B, T, C]: the mean smooth L1 distance of a prediction from its target."""
        predictions = self.predictions.to(self.targets.dtype)
        return F.smooth_l1_loss(predictions, self.targets, reduction="none").mean(-1)


@dataclass(frozen=True, slots=True)
class LevelErrors:
    """Errors of the predictions of one level."""

    cells: Cells
    across: int
    """Cells in a row of the grid."""
    values: Tensor
    """[B, T, C], as in the loss; arbitrary if a cell is not valid."""


class IJepa(Method):
    """The context encoder `encoder`, its slow copy `backbone`, which is evaluated, and the predictors."""

    def __init__(self, config: IJepaConfig, model: ViTConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.encoder = model.build(image_size=facts.image_size, channels=facts.channels)
        self.backbone: VisionTransformer = model.without_drops().build(  # type: ignore[assignment]  # of a ViTConfig
            image_size=facts.image_size, channels=facts.channels
        )
        self.backbone.requires_grad_(False)
        self.backbone.load_state_dict(self.encoder.state_dict())
        self.predictors = nn.ModuleList(self._predictor(model) for _ in range(self.levels))

    @property
    def levels(self) -> int:
        """Number of grids that are predicted."""
        return 1

    @property
    def trained_backbone(self) -> Backbone:
        return self.encoder

    def checkpoint_blocks(self) -> bool:
        checkpoint_blocks(self.predictors)
        return super().checkpoint_blocks()

    def compile_networks(self, backend: str = "inductor") -> None:
        super().compile_networks(backend)
        compile_blocks(self.predictors, backend)

    def views(self, image_size: int) -> Views:
        masks = self.masks().build(image_size // self.encoder.patch)
        return Views(crops={"image": self.config.views.build(image_size)}, masks=masks)

    def masks(self) -> MaskConfig:
        """Settings of the masks."""
        return self.config.masks

    def prepare(self, first_batch: Callable[[], Batch]) -> None:
        # Starting weights were loaded into the target encoder, which is exported.
        self.encoder.load_state_dict(self.backbone.state_dict())

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        context, (level,) = self.predict_levels(batch.views["image"][0], batch.masks)
        return Losses(self.compare(level), features=self.shown(context, {"target": level}, {"prediction": level}))

    def explain(self, images: Tensor, masks: Mapping[str, Tensor]) -> list[LevelErrors]:
        """The errors of the predictions on each level, the finest first; images are [B, C, S, S]."""
        patches = images.shape[-1] // self.encoder.patch
        _, levels = self.predict_levels(images, masks)
        return [LevelErrors(level.cells, patches // level.cells.side, level.errors()) for level in levels]

    def predict_levels(self, images: Tensor, masks: Mapping[str, Tensor]) -> tuple[Tensor, list[Level]]:
        """The tokens [B, Kc, D] of the context, and the levels predicted from them, the finest first."""
        cells = Cells.of(masks)
        (raw,) = self.target_tokens(images, [len(self.backbone.blocks)])
        context = self.encode_context(images, masks["context"])
        predictions = self.predict(0, context, masks["context"], cells, images)
        return context, [Level(cells, raw, predictions, self.targets(raw, cells))]

    def encode_context(self, images: Tensor, context: Tensor) -> Tensor:
        """Tokens [B, Kc, D] of the patches `context` [B, Kc], computed from these patches alone."""
        with record_function("student forward"):
            return self.encoder.forward_tokens(images, context).patches

    @torch.no_grad()
    def target_tokens(self, images: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """Tokens [B, N, D] of the whole image after each of the numbers of blocks `depths` of the target encoder."""
        with record_function("teacher forward"):
            return self.backbone.forward_depths(images, depths)

    @torch.no_grad()
    def targets(self, raw: Tensor, cells: Cells) -> Tensor:
        """[B, T, C, D]: the values `raw` [B, n x n, D] of `cells`, normalised."""
        tokens = raw if raw.dtype == torch.float64 else raw.float()
        return cells.gather(F.layer_norm(tokens, tokens.shape[-1:]) if self.config.norm_targets else tokens)

    def predict(
        self, level: int, context: Tensor, kept: Tensor, cells: Cells, images: Tensor, hints: Tensor | None = None
    ) -> Tensor:
        """[B, T, C, D], each block from its own copy of the context; `hints` [B, T, C, P] are added to the queries."""
        with record_function("predictor"):
            predictor = self.predictors[level]
            assert isinstance(predictor, Predictor)
            patches = images.shape[-1] // self.encoder.patch
            grid = grid_positions(patches, patches, predictor.width, device=kept.device)
            positions = grid.to(context.dtype)[kept]
            queries = cells.positions(patches, predictor.width).to(context.dtype)
            queries = queries if hints is None else queries + hints
            valid = cells.valid.flatten(0, 1) if cells.padded else None
            predicted = predictor(context, positions, queries.flatten(0, 1), valid)
            return torch.unflatten(predicted, 0, cells.indices.shape[:2])

    def compare(self, level: Level) -> Tensor:
        """The mean over images of the mean error of their valid cells."""
        with record_function("loss"):
            errors = level.errors()
            valid = level.cells.valid.to(errors.dtype)
            return ((errors * valid).sum((1, 2)) / valid.sum((1, 2))).mean()

    @torch.no_grad()
    def shown(
        self, context: Tensor, targets: Mapping[str, Level], predictions: Mapping[str, Level]
    ) -> dict[str, Tensor]:
        """One vector per image for the context, one per block for targets (before the norm) and predictions."""
        found = {"context": context.detach()[:, 0]}
        for name, level in targets.items():
            found[name] = torch.take_along_dim(level.raw, level.cells.indices[:, :, 0, None], dim=1).flatten(0, 1)
        for name, level in predictions.items():
            found[name] = level.predictions.detach()[:, :, 0].flatten(0, 1)
        return {name: vectors.float() for name, vectors in found.items()}

    def after_update(self, clock: Clock, applied: Tensor) -> None:
        with record_function("teacher update"):
            kept = self.target_momentum(clock)
            follow(list(self.backbone.parameters()), list(self.encoder.parameters()), applied * (1 - kept))

    def target_momentum(self, clock: Clock) -> float:
        """Share of the target encoder that remains in the update at `clock`."""
        shape = linear if self.config.momentum_shape == "linear" else cosine
        kept = shape(clock.epoch / clock.total_epochs, self.config.momentum, 1.0)
        kept = kept ** (clock.stage.batch_size / self.config.momentum_batch_size)
        return float(ema_decay(clock.step, decay=kept, warmup=self.config.momentum_warmup))

    def param_groups(self) -> Sequence[ParamGroup]:
        return [
            *split_by_decay(self.encoder, name="encoder.", hidden=True),
            *split_by_decay(self.predictors, name="predictors.", hidden=True),
        ]

    def advice(self, finding: str, clock: Clock) -> str:
        if finding != "feature_collapse":
            return ""
        if not self.config.norm_targets:
            return "targets of any size can be met by shrinking them: set method.norm_targets=true"
        return (
            f"the target encoder keeps {self.target_momentum(clock):.4g} of itself in an update: "
            "try a higher method.momentum, or a lower optim.lr"
        )

    def _predictor(self, model: ViTConfig) -> Predictor:
        depth, heads = self.config.predictor_depth, self.config.predictor_heads or model.heads
        return Predictor(model.width, width=self.predictor_width(model), depth=depth, heads=heads)

    def predictor_width(self, model: ViTConfig) -> int:
        """The width of a predictor's tokens.

        Raises:
            ConfigError: the width does not fit the heads.
        """
        wanted, heads = self.config.predictor_width, self.config.predictor_heads or model.heads
        unit = math.lcm(4, heads)
        if wanted == "auto":
            return max(min(model.width // 2, 384) // unit, 1) * unit
        if wanted % unit:
            raise ConfigError(
                f"method.predictor_width={wanted}: must be a multiple of 4 and of its {heads} heads; "
                f"use {-(-wanted // unit) * unit}, or set method.predictor_heads"
            )
        return wanted


def pooled(tokens: Tensor, side: int) -> Tensor:
    """Tokens [B, N, D] of a square grid, averaged within cells of `side` x `side`."""
    if side == 1:
        return tokens
    grid = round(tokens.shape[1] ** 0.5)
    square = tokens.transpose(1, 2).unflatten(2, (grid, grid))  # [B, D, h, w]
    return F.avg_pool2d(square, side).flatten(2).transpose(1, 2)


def encoder_config(method: str, model: ModelConfig) -> ViTConfig:
    """`model`, if it is a vision transformer over patches alone.

    Raises:
        ConfigError: `model` is another network.
    """
    way_out = "model.name=vit model.class_token=false model.pool=mean model.position=sincos"
    if not isinstance(model, ViTConfig):
        raise ConfigError(
            f"model.name={model.name}: method.name={method} leaves out patches, which only vit supports; use {way_out}"
        )
    if model.class_token:
        raise ConfigError(f"model.class_token=true: method.name={method} uses patches only; use {way_out}")
    return model
