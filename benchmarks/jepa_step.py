"""A training step of I-JEPA, and of H-JEPA: opsin against the published step of I-JEPA.

    PYTHONPATH=src python benchmarks/jepa_step.py [--work ti16 s16 cifar] [--rounds 5] [--no-memory]
    PYTHONPATH=src python benchmarks/jepa_step.py --device cuda --batch 256 --steps 10

Equal work for I-JEPA: the same networks and the same masks, drawn as published; loss, backward pass, AdamW, moving
average. `unbiased` draws opsin's own masks, which show more or less of an image. H-JEPA has two levels and so two
predictors, which nobody has published. Columns as in `dino_step.py`.

Shapes: B images of a batch, S side in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opsin.data.base import Batch, DataFacts
from opsin.data.views.masks import MaskConfig
from opsin.methods.hjepa import HJepaConfig
from opsin.methods.ijepa import IJepaConfig
from opsin.nn.vit import ViTConfig
from opsin.training.memory import MemoryConfig
from opsin.training.optim import AdamW
from published_ijepa import PublishedIJepa, published_masks
from step_race import Made, Work, kept_bytes, opsin_step, race, use_our_kernels

NOTHING_SPARED = MemoryConfig()


@dataclass(frozen=True, slots=True)
class JepaWork(Work):
    """What a step of a JEPA computes."""

    side_px: int
    predictor: tuple[int, int]
    """Width and depth."""
    min_keep: int = 10

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.side_px // self.model.patch

    def images(self) -> Tensor:
        """Normal numbers [B, 3, S, S]."""
        return self.normal(self.batch, 3, self.side_px, self.side_px)

    def masks(self) -> tuple[Tensor, Tensor]:
        """Context [B, Kc] and targets [B, 4, Kt], drawn as published."""
        drawn = published_masks(self.batch, (self.grid, self.grid), 0, min_keep=self.min_keep)
        return drawn.contexts[0].to(self.device), torch.stack(drawn.targets, 1).to(self.device)


def _vit(**sizes: int) -> ViTConfig:
    return ViTConfig(**sizes, class_token=False, pool="mean", position="sincos")  # type: ignore[arg-type]  # sizes only


WORKS = {
    "ti16": JepaWork("ViT-Ti/16, 224 px, predictor 96x6", _vit(), 16, 224, (96, 6)),
    "s16": JepaWork("ViT-S/16, 224 px, predictor 192x6", _vit(width=384, heads=6), 16, 224, (192, 6)),
    "cifar": JepaWork("ViT-Ti/4, 32 px, predictor 192x6", _vit(patch=4), 128, 32, (192, 6), min_keep=4),
}


def published(work: JepaWork, asked: str, same_kernels: bool) -> Made:
    """The published step."""
    step = PublishedIJepa(
        work.side_px,
        work.model.patch,
        work.model.width,
        work.model.depth,
        work.model.heads,
        *work.predictor,
        precision="bf16" if asked == "bf16" else "fp32",
        device=str(work.device),
    )
    images = work.images()
    context, targets = work.masks()
    if same_kernels:
        use_our_kernels(work.device)
    run = partial(step.step, images, [context], list(targets.unbind(1)))
    return run, kept_bytes([step.encoder, step.target_encoder, step.predictor], step.optimizer)


def ours(
    work: JepaWork, asked: str, *, levels: int = 0, memory: MemoryConfig = NOTHING_SPARED, unbiased: bool = False
) -> Made:
    """The step of `opsin train`: I-JEPA, or H-JEPA with so many levels."""
    facts = DataFacts((), 1_281_167, work.side_px, 3, (0.5,) * 3, (0.5,) * 3)
    width, depth = work.predictor
    masks = MaskConfig(min_context=4, coarsest=2 ** max(levels - 1, 0))
    if levels:
        wanted: IJepaConfig = HJepaConfig(predictor_width=width, predictor_depth=depth, levels=levels, masks=masks)
    else:
        wanted = IJepaConfig(predictor_width=width, predictor_depth=depth, masks=masks)
    ids = torch.arange(work.batch)
    if unbiased or levels:
        drawn = dict(masks.build(work.grid)(0, 0, ids))
    else:
        context, targets = work.masks()
        drawn = {"context": context, "targets": targets}
    batch = Batch({"image": work.images()[None]}, torch.full_like(ids, -1), ids, drawn).to(work.device)
    optim = AdamW(lr=1e-3, weight_decay=0.04)
    return opsin_step(wanted.build(work.model, facts), optim, asked, batch, memory)


WAYS: dict[str, Callable[[JepaWork], Made]] = {
    "published, fp32, as installed": partial(published, asked="fp32", same_kernels=False),
    "published, fp32, same kernels": partial(published, asked="fp32", same_kernels=True),
    "published, bf16": partial(published, asked="bf16", same_kernels=False),
    "opsin, fp32": partial(ours, asked="fp32"),
    "opsin, bf16": partial(ours, asked="bf16"),
    "opsin, bf16, unbiased": partial(ours, asked="bf16", unbiased=True),
    "opsin, bf16, checkpoint_blocks": partial(ours, asked="bf16", memory=MemoryConfig(checkpoint_blocks=True)),
    "opsin, bf16, H-JEPA with 2 levels": partial(ours, asked="bf16", levels=2),
}


if __name__ == "__main__":
    race(__file__, __doc__, WORKS, WAYS)
