"""H-JEPA: hidden features are predicted on several grids, from the coarsest to the finest.

The idea is LeCun's (2022, "A path towards autonomous machine intelligence", section 4.6): predict at several levels of
abstraction, each level helped by the one above. docs/HJEPA.md defines ours; with one level it is I-JEPA, bit for bit.

Shapes: L levels, level l a grid of cells of 2^l x 2^l patches; the others as in `ijepa.py`, C cells of a block.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from opsin.errors import ConfigError
from opsin.methods.base import Batch, Clock, DataFacts, Losses, ParamGroup, split_by_decay
from opsin.methods.ijepa import Cells, IJepa, IJepaConfig, encoder_config, pooled
from opsin.nn.backbone import ModelConfig
from opsin.nn.vit import ViTConfig
from opsin.schedule import Schedule


class HJepaConfig(IJepaConfig):
    """Prediction of hidden features on nested grids."""

    published = None
    name: Literal["hjepa"] = "hjepa"  # type: ignore[assignment]  # another member of the family
    levels: int = Field(3, ge=1)
    """Grids; each has cells of twice the side of the one below it."""
    level_weights: tuple[float, ...] | None = None
    """Weight of each level's loss, the finest first; null halves it from level to level: 1, 0.5, 0.25."""
    depths: tuple[int, ...] | None = None
    """Blocks of the target encoder after which each level takes its targets, the finest first; null: all of them."""
    level_schedules: list[Schedule] = []
    """A factor over the run on the learning rate of each level's predictor, the finest first; none is 1."""

    def build(self, model: ModelConfig, facts: DataFacts) -> "HJepa":
        return HJepa(self, encoder_config(self.name, model), facts)


class HJepa(IJepa):
    """I-JEPA with a predictor for each level; `hints` carry what a level predicts to the one below it."""

    config: HJepaConfig

    def __init__(self, config: HJepaConfig, model: ViTConfig, facts: DataFacts) -> None:
        self._levels = config.levels
        _check(config, model, facts.image_size)
        super().__init__(config, model, facts)
        self.weights = config.level_weights or tuple(0.5**level for level in range(config.levels))
        self.depths = config.depths or (model.depth,) * config.levels
        self.hints = nn.ModuleList(
            nn.Linear(model.width, self.predictor_width(model)) for _ in range(config.levels - 1)
        )
        for layer in self.hints:
            assert isinstance(layer, nn.Linear)
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    @property
    def levels(self) -> int:
        return self._levels

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        images, kept = batch.views["image"][0], batch.masks["context"]
        grid = images.shape[-1] // self.encoder.patch
        finest = Cells(batch.masks["targets"], batch.masks["target_valid"], 1)
        cells = [finest, *(coarser(finest, 2**level, grid) for level in range(1, self.levels))]
        taken = self.target_tokens(images, sorted(set(self.depths)))
        raw = dict(zip(sorted(set(self.depths)), taken, strict=True))
        context = self.encode_context(images, kept)
        predictions: dict[int, Tensor] = {}
        for level in reversed(range(self.levels)):
            hints = None
            if level + 1 < self.levels:
                above = value_above(predictions[level + 1], cells[level], cells[level + 1], grid)
                hints = self.hints[level](above)
            predictions[level] = self.predict(level, context, kept, cells[level], images, hints)
        losses = {
            level: self.compare(predictions[level], self.targets(raw[self.depths[level]], cells[level]), cells[level])
            for level in range(self.levels)
        }
        total = torch.stack([weight * losses[level] for level, weight in enumerate(self.weights)]).sum()
        targets = {
            f"target_{level}": (pooled(raw[depth], cells[level].side), cells[level])
            for level, depth in enumerate(self.depths)
        }
        said = {f"prediction_{level}": values for level, values in predictions.items()}
        parts = {f"level_{level}": loss for level, loss in losses.items()}
        return Losses(total, parts=parts, features=self.shown(context, targets, said))

    def param_groups(self) -> Sequence[ParamGroup]:
        groups = split_by_decay(self.encoder, name="encoder.", hidden=True)
        for level, predictor in enumerate(self.predictors):
            factor = self.config.level_schedules[level] if self.config.level_schedules else 1.0
            groups += split_by_decay(predictor, name=f"predictors.{level}.", lr_factor=factor)
            if level + 1 < self.levels:
                groups += split_by_decay(self.hints[level], name=f"hints.{level}.", lr_factor=factor)
        return groups


def coarser(cells: Cells, side: int, grid: int) -> Cells:
    """The cells of `side` x `side` patches that blocks of patches consist of, where those are whole cells."""
    rows, columns = cells.indices // grid, cells.indices % grid
    corner = (rows % side == 0) & (columns % side == 0) & cells.valid  # one patch for each cell
    count = cells.indices.shape[-1] // side**2
    order = torch.argsort((~corner).to(torch.uint8), dim=-1, stable=True)[..., :count]
    found = rows // side * (grid // side) + columns // side
    return Cells(found.gather(-1, order), corner.gather(-1, order), side)


def value_above(values: Tensor, cells: Cells, above: Cells, grid: int) -> Tensor:
    """[B, T, C, D]: for each of `cells` what `values` [B, T, C above, D] say of the cell that it lies in.

    Padding takes any of them.
    """
    across = grid // cells.side
    rows, columns = cells.indices // across, cells.indices % across
    parent = rows // 2 * (across // 2) + columns // 2
    same = (parent[..., None] == above.indices[..., None, :]) & above.valid[..., None, :]  # [B, T, C, C above]
    where = same.to(torch.uint8).argmax(-1)
    return torch.take_along_dim(values, where[..., None], dim=2)


def _check(config: HJepaConfig, model: ViTConfig, image_size: int) -> None:
    """See that the levels fit the grid, and the lists the levels.

    Raises:
        ConfigError: they do not.
    """
    side, grid = 2 ** (config.levels - 1), image_size // model.patch
    if grid % side:
        sizes = [n * side * model.patch for n in (grid // side, grid // side + 1) if n]
        raise ConfigError(
            f"method.levels={config.levels}: a grid of {grid} x {grid} patches cannot be halved {config.levels - 1} "
            f"times; use data.image_size={' or '.join(map(str, sizes))}, or fewer levels"
        )
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
    for depth in config.depths or ():
        if not 1 <= depth <= model.depth:
            raise ConfigError(f"method.depths: {depth} is not among the {model.depth} blocks of the encoder")
