"""A small I-JEPA and H-JEPA in float64, batches for them, and their training by the plain implementations.

B images, T target blocks of an image, C cells of a block
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from opsin.clock.schedule import Cosine
from opsin.data.base import Batch, DataFacts
from opsin.methods.base import Losses
from opsin.methods.hjepa import HJepa, HJepaConfig
from opsin.methods.ijepa import IJepa, IJepaConfig
from opsin.nn.vit import ViTConfig
from opsin.training.optim import AdamW, build_optimizer, schedule_setter
from opsin.training.state import StepPlan, TrainState
from tests.plain_dino import Moments, plain_adamw, plain_weight_decay
from tests.plain_hjepa import PlainHJepa
from tests.plain_ijepa import PlainIJepa, plain_ijepa_momentum
from tests.unit.methods.plain_steps import BATCH, EPOCHS, STEPS_PER_EPOCH, TIMELINE, plain_rates

J = TypeVar("J", bound=IJepa)

# Eight patches a side: two cells of the third level.
FACTS = DataFacts(("cat", "dog"), samples=64, image_size=32, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
GRID = 8
VIT = ViTConfig(width=12, depth=2, heads=2, patch=4, class_token=False, pool="mean", position="sincos")
MOMENTUM, MOMENTUM_BATCH = 0.9, 4  # another size than BATCH, so that the momenta are converted
# Steps change weights by about a percent.
OPTIM = AdamW(
    lr=4e-3,
    lr_batch_size=2 * BATCH,
    weight_decay=0.04,
    weight_decay_end=0.4,
    schedule=Cosine(warmup_epochs=1, warmup_start=0.25, end=0.01),
)
# Blocks that differ in size, so that some are padded, and blocks that do not; the latter two of whole cells of the
# third level, of which the grid has two a side.
MASKS: dict[str, dict[str, Any]] = {
    "ragged": {"targets": 3, "edges": "overhang", "context_keep": 0.6},  # some contexts repeat patches
    "equal": {"targets": 3, "target_scale": (0.18, 0.19), "target_ratio": (1.0, 1.0)},
    "ragged cells": {"targets": 2, "target_scale": (0.25, 0.5), "target_ratio": (0.5, 2.0)},
    "equal cells": {"targets": 2, "target_scale": (0.25, 0.25), "target_ratio": (1.0, 1.0)},
}
SMALL: dict[str, Any] = {
    "predictor_width": 8,
    "predictor_depth": 2,
    "momentum": MOMENTUM,
    "momentum_batch_size": MOMENTUM_BATCH,
}


def ijepa_config(masks: str = "ragged", **settings: Any) -> IJepaConfig:
    return IJepaConfig.model_validate({**SMALL, "masks": MASKS[masks], **settings})


def hjepa_config(masks: str = "ragged cells", **settings: Any) -> HJepaConfig:
    return HJepaConfig.model_validate({**SMALL, "masks": MASKS[masks], **settings})


def build_ijepa(masks: str = "ragged", **settings: Any) -> IJepa:
    torch.manual_seed(0)
    return disturbed(ijepa_config(masks, **settings).build(VIT, FACTS))


def build_hjepa(masks: str = "ragged cells", **settings: Any) -> HJepa:
    torch.manual_seed(0)
    return disturbed(hjepa_config(masks, **settings).build(VIT, FACTS))


def disturbed(method: J) -> J:
    """The method in float64, its encoders far from each other and no parameter at 0 or 1; positions stay."""
    method.double()
    with torch.no_grad():
        for name, param in method.named_parameters():
            if "pos_embed" not in name:
                param.add_(torch.randn_like(param), alpha=0.3)
    return method


def batch_of(method: IJepa, step: int = 0, size: int = BATCH, dtype: torch.dtype = torch.float64) -> Batch:
    """Some images, with values of size 1, and the masks that the method wants of them."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(1, size, 3, 32, 32, generator=generator, dtype=dtype)
    masks = method.views(32).masks
    assert masks is not None
    ids = torch.arange(size) + 100 * step
    return Batch({"image": images}, torch.zeros(size, dtype=torch.int64), ids, masks(0, 0, ids))


def plan_for(method: IJepa, config: AdamW = OPTIM, **changes: Any) -> StepPlan:
    return StepPlan(
        **{
            "forward": method,
            "clock": TIMELINE.clock,
            "set_schedule": schedule_setter(config, method),
            "autocast": nullcontext,
            "seed": 0,
            **changes,
        }
    )


def state_of(method: IJepa, config: AdamW = OPTIM) -> TrainState:
    return TrainState(method, build_optimizer(config, method))


def gradients(method: IJepa, batch: Batch, step: int = 0) -> tuple[Losses, dict[str, Tensor]]:
    """What a copy of the method says of a batch, and its gradients by name."""
    same = copy.deepcopy(method)
    losses = same(batch, TIMELINE.clock(step))
    losses.total.backward()
    return losses, {name: param.grad for name, param in same.named_parameters() if param.grad is not None}


class PlainRun:
    """Training as `SMALL`, `OPTIM` and `TIMELINE` want it; without `depths` I-JEPA, else H-JEPA."""

    def __init__(
        self,
        method: IJepa,
        *,
        depths: Sequence[int] | None = None,
        level_weights: Sequence[float] = (1.0,),
        lr_factor: Callable[[str, int], float] = lambda name, step: 1.0,
    ) -> None:
        sizes = (VIT.patch, VIT.width, VIT.depth, VIT.heads, SMALL["predictor_width"], SMALL["predictor_depth"])
        self.network: PlainIJepa | PlainHJepa
        self.network = PlainIJepa(*sizes) if depths is None else PlainHJepa(*sizes, depths=depths)
        self.network.double()
        self.level_weights, self.lr_factor = level_weights, lr_factor
        self.named: dict[str, Tensor] = {}
        """All parameters under the names that the method gives them."""
        for name, param, own in _pairs(method, self.network):
            assert own.shape == param.shape
            own.data.copy_(param)
            self.named[name] = own
        self.moments: dict[str, Moments] = {}

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: param for name, param in self.named.items() if param.requires_grad}

    def backward(self, batch: Batch) -> list[float]:
        """The loss of each level; the gradients of their weighted sum lie on the parameters."""
        losses = self.level_losses(batch)
        torch.stack([weight * loss for weight, loss in zip(self.level_weights, losses, strict=True)]).sum().backward()
        return [loss.item() for loss in losses]

    def level_losses(self, batch: Batch) -> list[Tensor]:
        """The mean over images of the mean over an image's valid cells."""
        images, masks = batch.views["image"][0], batch.masks
        valid = masks["target_valid"].double() if "target_valid" in masks else None
        if isinstance(self.network, PlainIJepa):
            weights = None if valid is None else valid / valid.sum((1, 2), keepdim=True)
            return [self.network.loss(images, masks["context"], masks["targets"], weights)]
        found = []
        for b in range(len(images)):
            # The plain loss counts all cells of a batch alike, whichever image they belong to.
            one = slice(b, b + 1)
            weights = None if valid is None else valid[one]
            found.append(self.network.level_losses(images[one], masks["context"][one], masks["targets"][one], weights))
        return [torch.stack(levels).mean() for levels in zip(*found, strict=True)]

    def update(self, step: int) -> None:
        """The rest of the step, with the gradients as `backward` left them."""
        rate = plain_rates()[step]
        decay = plain_weight_decay(EPOCHS, STEPS_PER_EPOCH, 0.04, 0.4)[step]
        for name, param in self.trained.items():
            plain_adamw([(name, param)], self.moments, rate * self.lr_factor(name, step), decay)
            param.grad = None
        momentum = plain_ijepa_momentum(EPOCHS, STEPS_PER_EPOCH, base=MOMENTUM)[step]
        with torch.no_grad():
            self.network.move_targets(momentum ** (BATCH / MOMENTUM_BATCH))


def _pairs(method: IJepa, plain: PlainIJepa | PlainHJepa) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and parameter of the method, and the plain one: both have them in the same order, save fixed positions."""
    places = {"encoder": "encoder", "backbone": "target_encoder"}
    if isinstance(plain, PlainIJepa):
        places["predictors"] = "predictor"
    else:
        places |= {"predictors": "predictors", "hints": "hints"}
    for place, other in places.items():
        own = [item for item in method.get_submodule(place).named_parameters() if item[0] != "pos_embed"]
        for (name, param), same in zip(own, plain.get_submodule(other).parameters(), strict=True):
            yield f"{place}.{name}", param, same
