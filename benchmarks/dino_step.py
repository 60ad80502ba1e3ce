"""A training step of DINO: opsin against the published step, and against lightly's parts where it is installed.

    PYTHONPATH=src python benchmarks/dino_step.py [--work ti16 s16 cifar] [--rounds 5] [--no-memory]
    PYTHONPATH=src python benchmarks/dino_step.py --device cuda --batch 64 --steps 10

Equal work: the same network, heads, views and 65,536 prototypes; loss, backward pass, clip of each parameter,
AdamW, moving average, centre. `as installed` is the published step with torch's own settings, `same kernels` with
the matrix kernels that opsin chooses. Each way of working lives in a process of its own. `memory` is the peak of live
tensors beyond weights, teacher and moments: activations, gradients and temporaries.

Shapes: B images of a batch, S side of a view in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from opsin.data.base import Batch, DataFacts
from opsin.methods.dino import DinoConfig, DinoViews
from opsin.nn.vit import ViTConfig
from opsin.training.memory import MemoryConfig
from opsin.training.optim import AdamW
from published_dino import PublishedDino, StepSettings
from step_race import Made, Work, kept_bytes, opsin_step, race, use_our_kernels

try:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
except ImportError:
    DINOLoss = None

NOTHING_SPARED = MemoryConfig()


@dataclass(frozen=True, slots=True)
class DinoWork(Work):
    """What a step of DINO computes."""

    sides_px: tuple[int, int]
    local_count: int = 8
    prototypes: int = 65536

    def views(self) -> dict[str, Tensor]:
        """Normal numbers [count, B, 3, S, S]."""
        large, small = self.sides_px
        return {
            "global_1": self.normal(1, self.batch, 3, large, large),
            "global_2": self.normal(1, self.batch, 3, large, large),
            "local": self.normal(self.local_count, self.batch, 3, small, small),
        }


WORKS = {
    "ti16": DinoWork("ViT-Ti/16, 2x224 + 8x96", ViTConfig(), 4, (224, 96)),
    "s16": DinoWork("ViT-S/16, 2x224 + 8x96", ViTConfig(width=384, heads=6), 8, (224, 96)),
    "cifar": DinoWork("ViT-Ti/4, 2x32 + 8x16", ViTConfig(patch=4), 64, (32, 16)),
}


def published(work: DinoWork, asked: str, same_kernels: bool) -> Made:
    """The published step."""
    step = PublishedDino(
        work.sides_px[0],
        work.model.patch,
        work.model.width,
        work.model.depth,
        work.model.heads,
        prototypes=work.prototypes,
        precision="bf16" if asked == "bf16" else "fp32",
        device=str(work.device),
    )
    views = [image for view in work.views().values() for image in view]
    if same_kernels:
        use_our_kernels(work.device)

    def run() -> None:
        step.step(views, StepSettings())

    return run, kept_bytes([step.student, step.teacher], step.optimizer)


def with_lightly(work: DinoWork) -> Made:
    """The published backbone and optimizer step, with the head and the loss of lightly."""
    assert DINOLoss is not None
    step = PublishedDino(
        work.sides_px[0],
        work.model.patch,
        work.model.width,
        work.model.depth,
        work.model.heads,
        prototypes=8,
        device=str(work.device),
    )
    heads = [DINOProjectionHead(work.model.width, 2048, 256, work.prototypes, freeze_last_layer=0) for _ in range(2)]
    for network, head in zip((step.student, step.teacher), heads, strict=True):
        network.head = head.to(work.device)
    for param in step.teacher.parameters():
        param.requires_grad_(False)
    loss = DINOLoss(work.prototypes).to(work.device)
    optimizer = torch.optim.AdamW(step.student.parameters())
    views = [image for view in work.views().values() for image in view]

    def run() -> None:
        with torch.no_grad():
            said = list(step.teacher(views[:2]).chunk(2))
        total = loss(said, list(step.student(views).chunk(len(views))), epoch=50)
        optimizer.zero_grad()
        total.backward()
        for param in step.student.parameters():
            if param.grad is not None:
                nn.utils.clip_grad_norm_(param, 3.0)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(step.teacher.parameters(), step.student.parameters(), strict=True):
                slow.mul_(0.996).add_(fast, alpha=0.004)

    return run, kept_bytes([step.student, step.teacher], optimizer)


def ours(work: DinoWork, asked: str, *, memory: MemoryConfig = NOTHING_SPARED, freeze_epochs: float = 0.0) -> Made:
    """The step of `opsin train`."""
    facts = DataFacts((), 1_281_167, work.sides_px[0], 3, (0.5,) * 3, (0.5,) * 3)
    wanted = DinoConfig(
        prototypes=work.prototypes,
        freeze_epochs=freeze_epochs,
        views=DinoViews(local_size=work.sides_px[1], local_count=work.local_count),
    )
    ids = torch.arange(work.batch)
    batch = Batch(work.views(), torch.full_like(ids, -1), ids).to(work.device)
    optim = AdamW(lr=5e-4, weight_decay=0.04, clip_norm=3.0, clip="each")
    return opsin_step(wanted.build(work.model, facts), optim, asked, batch, memory)


WAYS: dict[str, Callable[[DinoWork], Made]] = {
    "published, fp32, as installed": partial(published, asked="fp32", same_kernels=False),
    "published, fp32, same kernels": partial(published, asked="fp32", same_kernels=True),
    "published, bf16": partial(published, asked="bf16", same_kernels=False),
    "opsin, fp32": partial(ours, asked="fp32"),
    "opsin, fp32, view_chunk=8": partial(ours, asked="fp32", memory=MemoryConfig(view_chunk=8)),
    "opsin, bf16": partial(ours, asked="bf16"),
    "opsin, bf16, view_chunk=8": partial(ours, asked="bf16", memory=MemoryConfig(view_chunk=8)),
    "opsin, bf16, view_chunk=2": partial(ours, asked="bf16", memory=MemoryConfig(view_chunk=2)),
    "opsin, bf16, checkpoint_blocks": partial(ours, asked="bf16", memory=MemoryConfig(checkpoint_blocks=True)),
    "opsin, bf16, both": partial(ours, asked="bf16", memory=MemoryConfig(checkpoint_blocks=True, view_chunk=8)),
    "opsin, bf16, prototypes frozen": partial(ours, asked="bf16", freeze_epochs=1000.0),
}
if DINOLoss is not None:
    WAYS["lightly's head and loss, fp32"] = with_lightly


if __name__ == "__main__":
    race(__file__, __doc__, WORKS, WAYS)
