"""H-JEPA: hidden features are predicted on several grids, from the coarsest to the finest.

After LeCun 2022, "A path towards autonomous machine intelligence", section 4.6: predictions at several levels of
abstraction, each helped by the level above. docs/HJEPA.md defines ours; with one level it is I-JEPA, bit for bit.

Shapes: L levels, level l a grid of cells of 2^l x 2^l patches; the others as in `ijepa.py`, C cells of a block.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from opsin.clock.schedule import OneCycle, Schedule
from opsin.data.views.masks import MaskConfig
from opsin.errors import ConfigError
from opsin.methods.base import Batch, Clock, DataFacts, Losses, ParamGroup, Views, split_by_decay
from opsin.methods.ijepa import Cells, IJepa, IJepaConfig, Level, encoder_config, pooled
from opsin.nn.backbone import ModelConfig
from opsin.nn.vit import ViTConfig


class HJepaConfig(IJepaConfig):
    """Prediction of hidden features on nested grids."""

    published = None
    name: Literal["hjepa"] = "hjepa"  # type: ignore[assignment]  # another member of the family
    levels: int = Field(3, ge=1)
    """Number of grids; the cells of each have twice the side of those one level below."""
    level_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Weight of the loss of each level, the finest first; null halves it at each level: 1, 0.5, 0.25."""
    depths: tuple[int, ...] | None = None
    """Number of blocks of the target encoder before the targets of each level, the finest first; null is all."""
    level_schedules: list[Schedule] = []
    """Schedules of the learning rate of each level's predictor, the finest first; an empty list is factor 1."""

    def build(self, model: ModelConfig, facts: DataFacts) -> "HJepa":
        return HJepa(self, encoder_config(self.name, model), facts)


class HJepa(IJepa):
    """I-JEPA with a predictor for each level; `hints` carry the predictions of a level to the one below."""

    config: HJepaConfig

    def __init__(self, config: HJepaConfig, model: ViTConfig, facts: DataFacts) -> None:
        self._levels = config.levels
        _check_lists(config, model)
        super().__init__(config, model, facts)
        self.weights = config.level_weights or tuple(0.5**level for level in range(config.levels))
        self.depths = config.depths or (model.depth,) * config.levels
        self.hints = nn.ModuleList(
            nn.Linear(model.width, self.predictor_width(model)) for _ in range(config.levels - 1)
        )
        for layer in self.hints:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.views(facts.image_size)  # refuses an impossible size before a run begins

    @property
    def levels(self) -> int:
        return self._levels

    def views(self, image_size: int) -> Views:
        _check_grid(self.levels, image_size, self.encoder.patch)
        return super().views(image_size)

    def masks(self) -> MaskConfig:
        side, given = 2 ** (self.levels - 1), self.config.masks.coarsest
        if side > 1 and self.config.masks.parity == "published":
            raise ConfigError(
                f"method.masks.parity=published: the released sampler has one grid, and {self.levels} levels need "
                "blocks of whole coarse cells; use method.levels=1, or parity=unbiased"
            )
        if given != 1 and given % side:
            raise ConfigError(
                f"method.masks.coarsest={given}: {self.levels} levels need cells of a multiple of {side} patches; "
                "leave it out"
            )
        return self.config.masks.model_copy(update={"coarsest": side if given == 1 else given})

    def schedules(self) -> Mapping[str, Schedule]:
        return {f"method.level_schedules.{level}": wanted for level, wanted in enumerate(self.config.level_schedules)}

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        context, levels = self.predict_levels(batch.views["image"][0], batch.masks)
        losses = [self.compare(level) for level in levels]
        total = torch.stack([weight * loss for weight, loss in zip(self.weights, losses, strict=True)]).sum()
        targets = {f"target_{n}": level for n, level in enumerate(levels)}
        # The coarsest first, as they were predicted.
        predictions = {f"prediction_{n}": levels[n] for n in reversed(range(self.levels))}
        parts = {f"level_{n}": loss for n, loss in enumerate(losses)}
        return Losses(total, parts=parts, features=self.shown(context, targets, predictions))

    def predict_levels(self, images: Tensor, masks: Mapping[str, Tensor]) -> tuple[Tensor, list[Level]]:
        kept, grid = masks["context"], images.shape[-1] // self.encoder.patch
        finest = Cells.of(masks)
        cells = [finest, *(coarser(finest, 2**level, grid) for level in range(1, self.levels))]
        depths = sorted(set(self.depths))
        tokens = dict(zip(depths, self.target_tokens(images, depths), strict=True))
        raw = [pooled(tokens[depth], 2**level) for level, depth in enumerate(self.depths)]
        context = self.encode_context(images, kept)
        predictions: dict[int, Tensor] = {}
        for level in reversed(range(self.levels)):
            hints = None
            if level + 1 < self.levels:
                above = value_above(predictions[level + 1], cells[level], cells[level + 1], grid)
                hints = self.hints[level](above)
            predictions[level] = self.predict(level, context, kept, cells[level], images, hints)
        return context, [
            Level(cells[level], raw[level], predictions[level], self.targets(raw[level], cells[level]))
            for level in range(self.levels)
        ]

    def param_groups(self) -> Sequence[ParamGroup]:
        groups = split_by_decay(self.encoder, name="encoder.", hidden=True)
        for level, predictor in enumerate(self.predictors):
            factor = self.config.level_schedules[level] if self.config.level_schedules else 1.0
            groups += split_by_decay(predictor, name=f"predictors.{level}.", lr_factor=factor, hidden=True)
            if level + 1 < self.levels:
                groups += split_by_decay(self.hints[level], name=f"hints.{level}.", lr_factor=factor)
        return groups


def coarser(cells: Cells, side: int, grid: int) -> Cells:
    """The cells of `side` x `side` patches in blocks of patches that consist of whole cells."""
    rows, columns = cells.indices // grid, cells.indices % grid
    corner = (rows % side == 0) & (columns % side == 0) & cells.valid  # one patch for each cell
    count = cells.indices.shape[-1] // side**2
    order = torch.argsort((~corner).to(torch.uint8), dim=-1, stable=True)[..., :count]
    found = rows // side * (grid // side) + columns // side
    return Cells(found.gather(-1, order), corner.gather(-1, order), side, cells.padded)


def value_above(values: Tensor, cells: Cells, above: Cells, grid: int) -> Tensor:
    """[B, T, C, D]: for each of `cells` the entry of `values` [B, T, C above, D] of the cell that contains it.

    Padding gets an arbitrary entry.
    """
    across = grid // cells.side
    rows, columns = cells.indices // across, cells.indices % across
    parent = rows // 2 * (across // 2) + columns // 2
    same = (parent[..., None] == above.indices[..., None, :]) & above.valid[..., None, :]  # [B, T, C, C above]
    where = same.to(torch.uint8).argmax(-1)
    # Whole rows of one table: an index for each of D values would be sorted, one by one, in the backward pass.
    blocks = torch.arange(values.shape[0] * values.shape[1], device=where.device).view(*values.shape[:2], 1)
    return values.flatten(0, 2)[where + blocks * values.shape[2]]


def _check_grid(levels: int, image_size: int, patch: int) -> None:
    """Check that images of this side consist of whole coarsest cells, at least two a side.

    Raises:
        ConfigError: they do not.
    """
    side, grid = 2 ** (levels - 1), image_size // patch
    if levels > 1 and (grid % side or grid < 2 * side):
        nearest = max(grid // side, 2)
        sizes = " or ".join(str(cells * side * patch) for cells in (nearest, nearest + 1))
        raise ConfigError(
            f"method.levels={levels}: a grid of {grid} x {grid} patches (images of {image_size} px) does not consist "
            f"of cells of {side} x {side} patches, two a side at least; use images of {sizes} px, or fewer levels"
        )


def _check_lists(config: HJepaConfig, model: ViTConfig) -> None:
    """Check that each list has a usable entry for each level.

    Raises:
        ConfigError: an entry is missing or cannot be used.
    """
    lists = {
        "level_weights": config.level_weights,
        "depths": config.depths,
        "level_schedules": config.level_schedules or None,
    }
    for key, given in lists.items():
        if given is not None and len(given) != config.levels:
            raise ConfigError(
                f"method.{key}: has {len(given)} entries for method.levels={config.levels}; give one for each level"
            )
    if config.level_weights is not None and not any(config.level_weights):
        raise ConfigError("method.level_weights: all are 0, and nothing would be learned; give one above 0")
    for depth in config.depths or ():
        if not 1 <= depth <= model.depth:
            raise ConfigError(
                f"method.depths: {depth} is not among the {model.depth} blocks of the encoder; give each level one of "
                f"1 to {model.depth}"
            )
    for number, schedule in enumerate(config.level_schedules):
        if isinstance(schedule, OneCycle) and schedule.momentum is not None:
            raise ConfigError(
                f"method.level_schedules.{number}.momentum: these schedules are factors on the learning rate alone; "
                "leave it out, or set optim.schedule.momentum"
            )
