"""Pictures of a few images as a method treats them: masks, errors of its predictions, and its attention.

Shapes: B images, C channels, S side in pixels, T target blocks of an image, K cells of a block, n x n cells of a
grid, N patches, H heads.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from opsin.clock.cadence import StepEvery
from opsin.data.base import MaskSampler, Views
from opsin.errors import ConfigError
from opsin.evaluation.map_pictures import Blocks, draw_attention, draw_predictions
from opsin.methods.base import Method
from opsin.nn.vit import VisionTransformer
from opsin.training.evaluator import EvaluationContext, EvaluatorConfig, untouched

_PATIENCE = 1000  # masks without use in a row, after which the other patches count as never hidden


class MapsConfig(EvaluatorConfig):
    """Pictures of masks, of the error of predictions, and of attention, for a few images, in DIR/maps."""

    name: Literal["maps"] = "maps"
    every: StepEvery = "5 epochs"
    """Interval between evaluations. The end of the run is always evaluated."""
    images: int = Field(8, gt=0)
    """Number of images shown, spread evenly over the validation images, or the training images if there are none."""
    repeats: int = Field(4, gt=0)
    """The least number of predictions of each patch, from different masks; their mean error is shown."""

    def build(self, context: EvaluationContext, prefix: str) -> "Maps":
        return Maps(self, context, prefix)

    def check(self, method: Method, prefix: str) -> None:
        if not isinstance(method, Explainer) and not isinstance(method.backbone, VisionTransformer):
            raise ConfigError(
                f"evaluators.{prefix}: there are no maps of a {type(method).__name__} with this network, which neither "
                f"predicts hidden patches nor shows its attention; use model.name=vit, or evaluators.{prefix}=null"
            )


class BlockCells(Protocol):
    """The cells of target blocks, on a grid."""

    @property
    def indices(self) -> Tensor:
        """int64 [B, T, K], row by row on the grid."""
        ...

    @property
    def valid(self) -> Tensor:
        """[B, T, K]: false where an index is only padding."""
        ...


class GridErrors(Protocol):
    """The errors of the predictions of one grid."""

    @property
    def cells(self) -> BlockCells: ...

    @property
    def across(self) -> int:
        """n, the cells in a row of the grid."""
        ...

    @property
    def values(self) -> Tensor:
        """[B, T, K]"""
        ...


@runtime_checkable
class Explainer(Protocol):
    """A method that predicts hidden patches of an image, on one grid or several."""

    def views(self, image_size: int) -> Views: ...

    def explain(self, images: Tensor, masks: Mapping[str, Tensor]) -> Sequence[GridErrors]:
        """The errors of the predictions for normalised images [B, C, S, S], the finest grid first."""
        ...


@dataclass(frozen=True, slots=True)
class MapsReport:
    """The means of the maps, and the paths of the pictures."""

    values: Mapping[str, float]
    pictures: Sequence[Path]

    def lines(self) -> list[str]:
        """For a reader."""
        said = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self.values.items())
        return [f"maps: {said}", *(f"wrote {path}" for path in self.pictures)]

    def as_dict(self) -> dict[str, object]:
        """The same as plain values for JSON."""
        return {**self.values, "pictures": [str(path) for path in self.pictures]}


class Maps:
    """Draws the same images at each evaluation; implements `StepEvaluator`."""

    def __init__(self, config: MapsConfig, context: EvaluationContext, prefix: str = "maps") -> None:
        self.step = 0
        self._context = context
        self._data = context.sample(config.images)
        self._folder = context.folder / "maps" / ("" if prefix == "maps" else prefix)
        self._repeats = config.repeats

    def evaluate(self, method: Method) -> Mapping[str, float]:
        """`error_0`, ... by level, the finest first: the mean over all patches or cells that can be hidden.

        `attention_spread`: the share of the patches that attention is spread over, 1 if it is the same everywhere.
        """
        return self.report(method, f"step-{self.step:08d}").values

    def report(self, method: Method, name: str) -> MapsReport:
        """Draw the pictures NAME-*.png of a method.

        Raises:
            DataError: no image can be read.
        """
        values: dict[str, float] = {}
        pictures: dict[str, bytes] = {}
        with untouched(method, self._context.device):
            images = self._images()
            shown = self._restored(images)
            if isinstance(method, Explainer):
                maps, blocks = self.errors(method, images)
                values |= {f"error_{level}": float(found.nanmean()) for level, found in enumerate(maps)}
                pictures["predictions"] = draw_predictions(shown, blocks, maps)
            if isinstance(method.backbone, VisionTransformer):
                attention = self.attention(method.backbone, images)
                values["attention_spread"] = float(_spread(attention).mean())
                pictures["attention"] = draw_attention(shown, attention)
        written = {kind: self._folder / f"{name}-{kind}.png" for kind in pictures}
        for kind, path in written.items():
            self._context.write(path, pictures[kind])
        return MapsReport(values, list(written.values()))

    def errors(self, method: Explainer, images: Tensor) -> tuple[list[Tensor], list[Blocks]]:
        """For each level the mean errors [B, n, n], NaN in cells that no mask hides; and the blocks of each mask.

        All images get the same masks, so that their maps can be compared.
        """
        sampler = method.views(images.shape[-1]).masks
        assert sampler is not None, "a method that predicts hidden patches has masks"
        sums: list[Tensor] = []
        counts: list[Tensor] = []
        blocks: list[Blocks] = []
        for masks in covering_masks(sampler, self._repeats):
            everywhere = {
                name: mask.to(self._context.device).expand(len(images), *mask.shape[1:]) for name, mask in masks.items()
            }
            with self._context.autocast():
                levels = method.explain(images, everywhere)
            if not sums:
                sums = [torch.zeros(len(images), level.across**2) for level in levels]
                counts = [torch.zeros(level.across**2) for level in levels]
            for level, total, times in zip(levels, sums, counts, strict=True):
                valid = level.cells.valid[0].cpu()
                cells = level.cells.indices[0].cpu()[valid]
                # On the CPU and one cell after the other: the same bits each time.
                total.index_add_(1, cells, level.values.float().cpu()[:, valid])
                times.index_add_(0, cells, torch.ones(len(cells)))
            blocks.append(_blocks(masks, levels))
            if counts[0].min() >= self._repeats:
                break
        maps = [total / times for total, times in zip(sums, counts, strict=True)]  # 0 / 0 is NaN
        return [found.unflatten(1, (level, level)) for found, level in zip(maps, blocks[0].across, strict=True)], blocks

    def attention(self, backbone: VisionTransformer, images: Tensor) -> Tensor:
        """The attention of each head of the last block to each patch: [B, H, N], of the sum 1.

        It is that of the class token, or the mean of all patches if there is none.
        """
        with self._context.autocast():
            found = backbone.attention(images).float()  # [B, H, T, T]
        asking = found[:, :, 0, 1:] if backbone.prefix else found.mean(2)
        return (asking / asking.sum(-1, keepdim=True)).cpu()

    def _images(self) -> Tensor:
        batches = list(self._data.batches(self._data.facts.samples))
        return torch.cat([batch.to(self._context.device).views["image"][0] for batch in batches])

    def _restored(self, images: Tensor) -> Tensor:
        """Normalised images as they look, [B, C, S, S] in 0..1."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self._data.facts.mean, self._data.facts.std))
        return (images.float().cpu() * std + mean).clamp(0, 1)


def covering_masks(sampler: MaskSampler, repeats: int) -> Iterator[Mapping[str, Tensor]]:
    """Masks of one image each, without those that hide no patch that was hidden fewer than `repeats` times."""
    hidden: Counter[int] = Counter()
    without_use = 0
    for number in count():
        masks = sampler(0, 0, torch.tensor([number]))
        targets = masks["targets"]
        patches = targets[masks.get("target_valid", torch.ones_like(targets, dtype=torch.bool))].tolist()
        if any(hidden[patch] < repeats for patch in patches):
            hidden.update(patches)
            without_use = 0
            yield masks
        elif (without_use := without_use + 1) == _PATIENCE:
            return


def _blocks(masks: Mapping[str, Tensor], levels: Sequence[GridErrors]) -> Blocks:
    side = levels[0].across
    seen = torch.zeros(side**2, dtype=torch.bool)
    seen[masks["context"][0]] = True
    cells = [
        [indices[valid].tolist() for indices, valid in zip(level.cells.indices[0], level.cells.valid[0], strict=True)]
        for level in levels
    ]
    return Blocks(seen.view(side, side), cells, [level.across for level in levels])


def _spread(attention: Tensor) -> Tensor:
    """exp(entropy) over N: [B, H], from 1 / N to 1."""
    entropy = -(attention * attention.clamp_min(1e-12).log()).sum(-1)
    return entropy.exp() / attention.shape[-1]
