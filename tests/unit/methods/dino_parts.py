"""A small DINO in float64, batches for it, and the same training written out in plain torch.

B images, S side in pixels, N patches, T tokens, D width, K prototypes
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.clock.schedule import Cosine
from opsin.data.base import Batch, DataFacts
from opsin.methods.dino import Dino, DinoConfig
from opsin.nn.backbone import ModelConfig
from opsin.nn.vit import ViTConfig
from opsin.training.optim import AdamW, build_optimizer, schedule_setter
from opsin.training.state import StepPlan, TrainState
from tests.plain_dino import (
    Moments,
    PlainHead,
    gelu,
    plain_adamw,
    plain_center,
    plain_clip,
    plain_ema,
    plain_loss,
    plain_momentum,
    plain_teacher_temperature,
    plain_weight_decay,
)
from tests.unit.methods.plain_steps import BATCH, EPOCHS, STEPS_PER_EPOCH, TIMELINE, plain_rates

FACTS = DataFacts(("cat", "dog"), samples=64, image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
VIT = ViTConfig(width=12, depth=2, heads=2, patch=4)
STUDENT_TEMPERATURE, WARMUP_TEMPERATURE, TEMPERATURE, MOMENTUM = 0.1, 0.04, 0.07, 0.9
MOMENTUM_BATCH = 4  # another size than BATCH, so that the momenta are converted
# Steps change weights by about a percent; half of the gradients are longer than the limit.
OPTIM = AdamW(
    lr=4e-3,
    lr_batch_size=2 * BATCH,
    weight_decay=0.04,
    weight_decay_end=0.4,
    clip_norm=1.0,
    clip="each",
    schedule=Cosine(warmup_epochs=1, warmup_start=0.25, end=0.01),
)


def dino_config(**settings: Any) -> DinoConfig:
    """Twenty-four prototypes, two large views and two small ones, the prototypes at rest in the first epoch."""
    small: dict[str, Any] = {
        "prototypes": 24,
        "hidden": 20,
        "bottleneck": 8,
        "student_temperature": STUDENT_TEMPERATURE,
        "teacher_temperature": TEMPERATURE,
        "warmup_temperature": WARMUP_TEMPERATURE,
        "warmup_temperature_epochs": 2,
        "momentum": MOMENTUM,
        "momentum_batch_size": MOMENTUM_BATCH,
        "views": {"local_count": 2, "local_size": 8},
    }
    return DinoConfig.model_validate({**small, **settings})


def build_dino(model: ModelConfig = VIT, facts: DataFacts = FACTS, **settings: Any) -> Dino:
    """Student and teacher far from each other and from zero, in float64, and a centre that is not zero."""
    torch.manual_seed(0)
    method = dino_config(**settings).build(model, facts).double()
    with torch.no_grad():
        for name, param in method.named_parameters():
            # Lengths of prototypes stay around 1.
            param.add_(torch.randn_like(param), alpha=0.1 if name.endswith("weight_g") else 0.3)
        if not method.config.learn_scale:
            method.prototypes.weight_g.fill_(1)
            method.teacher_prototypes.weight_g.fill_(1)
        method.center += 0.1 * torch.randn_like(method.center)
    return method


def batch_of(step: int = 0, size: int = BATCH, dtype: torch.dtype = torch.float64) -> Batch:
    """The views of some images, with values of size 1."""
    generator = torch.Generator().manual_seed(step)
    sides = {"global_1": (1, 16), "global_2": (1, 16), "local": (2, 8)}
    views = {
        name: torch.randn(count, size, 3, side, side, generator=generator, dtype=dtype)
        for name, (count, side) in sides.items()
    }
    return Batch(views, torch.zeros(size, dtype=torch.int64), torch.arange(size))


def plan_for(method: Dino, config: AdamW = OPTIM, **changes: Any) -> StepPlan:
    return StepPlan(
        **{
            "forward": method,
            "clock": TIMELINE.clock,
            "set_schedule": schedule_setter(config, method),
            "autocast": nullcontext,
            "seed": 0,
            "clip_norm": config.clip_norm,
            "clip_each": config.clip == "each",
            **changes,
        }
    )


def state_of(method: Dino, config: AdamW = OPTIM) -> TrainState:
    return TrainState(method, build_optimizer(config, method))


class PlainViT(nn.Module):
    """The class token [B, D] of images [B, 3, S, S]: one head and one patch at a time, weights copied by name."""

    def __init__(self, network: nn.Module, *, heads: int, patch: int, grid: int) -> None:
        super().__init__()
        self.heads, self.patch, self.grid = heads, patch, grid
        self.depth = 1 + max(int(name.split(".")[1]) for name, _ in network.named_parameters() if "blocks" in name)
        for name, param in network.named_parameters():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(param.detach().clone()))

    def at(self, name: str) -> Tensor:
        return self.get_parameter(name.replace(".", "/"))

    def forward(self, images: Tensor) -> Tensor:
        side = images.shape[-1] // self.patch
        places = self.positions(side)  # [1 + N, D]
        filters, bias = self.at("patch_embed.proj.weight"), self.at("patch_embed.proj.bias")
        tokens = [self.at("cls_token")[0].expand(len(images), -1) + places[0]]
        for row in range(side):
            for column in range(side):
                top, left = row * self.patch, column * self.patch
                cut = images[:, :, top : top + self.patch, left : left + self.patch]
                tokens.append(torch.einsum("bchw,dchw->bd", cut, filters) + bias + places[1 + row * side + column])
        x = torch.stack(tokens, dim=1)  # [B, T, D]
        for index in range(self.depth):
            block = f"blocks.{index}"
            x = x + self.attend(self.normalise(x, f"{block}.norm1"), f"{block}.attn")
            hidden = gelu(self.linear(self.normalise(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            x = x + self.linear(hidden, f"{block}.mlp.fc2")
        return self.normalise(x, "norm")[:, 0]

    def attend(self, x: Tensor, name: str) -> Tensor:
        width = x.shape[-1]
        size = width // self.heads
        qkv = self.linear(x, f"{name}.qkv")  # [B, T, 3 D]
        mixed = []
        for head in range(self.heads):
            q, k, v = (qkv[..., part * width + head * size :][..., :size] for part in range(3))
            mixed.append((q @ k.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ v)
        return self.linear(torch.cat(mixed, dim=-1), f"{name}.proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.at(f"{name}.weight").T + self.at(f"{name}.bias")

    def normalise(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / deviation * self.at(f"{name}.weight") + self.at(f"{name}.bias")

    def positions(self, side: int) -> Tensor:
        embedding = self.at("pos_embed")[0]
        if side == self.grid:
            return embedding
        grid = embedding[1:].T.reshape(1, -1, self.grid, self.grid)
        resized = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
        return torch.cat([embedding[:1], resized[0].flatten(1).T])


class PlainDino:
    """Training as `dino_config`, `OPTIM` and `TIMELINE` want it, a view and a pair of views at a time."""

    def __init__(self, method: Dino) -> None:
        shape = {"heads": VIT.heads, "patch": VIT.patch, "grid": FACTS.image_size // VIT.patch}
        self.student = PlainViT(method.student, **shape)
        self.teacher = PlainViT(method.backbone, **shape)
        self.student_head = _plain_head(method.student_head, method.prototypes, learn_scale=method.config.learn_scale)
        self.teacher_head = _plain_head(method.teacher_head, method.teacher_prototypes)
        self.center = method.center.clone()
        self.moments: dict[str, Moments] = {}

    def named(self) -> dict[str, Tensor]:
        """The student's parameters under the names that `Dino` gives them."""
        return {
            **{f"student.{name.replace('/', '.')}": param for name, param in self.student.named_parameters()},
            **_head_names(self.student_head, "student_head", "prototypes"),
        }

    def named_teacher(self) -> dict[str, Tensor]:
        return {
            **{f"backbone.{name.replace('/', '.')}": param for name, param in self.teacher.named_parameters()},
            **_head_names(self.teacher_head, "teacher_head", "teacher_prototypes"),
        }

    def backward(self, batch: Batch, step: int) -> tuple[float, Tensor]:
        """The loss, whose gradients lie on the student's parameters, and the mean of the teacher's scores [K]."""
        views = [view for name in ("global_1", "global_2", "local") for view in batch.views[name]]
        with torch.no_grad():
            taught = [self.teacher_head(self.teacher(view)) for view in views[:2]]
        said = [self.student_head(self.student(view)) for view in views]
        temperatures = plain_teacher_temperature(EPOCHS, 2, WARMUP_TEMPERATURE, TEMPERATURE)
        temperature = temperatures[step // STEPS_PER_EPOCH]
        loss, scores = plain_loss(said, taught, self.center, STUDENT_TEMPERATURE, temperature)
        loss.backward()
        return loss.item(), scores

    def update(self, scores: Tensor, step: int) -> None:
        """The rest of the step, with the gradients as `backward` left them."""
        named = self.named()
        assert OPTIM.clip_norm is not None
        plain_clip(named.values(), OPTIM.clip_norm)
        if step < STEPS_PER_EPOCH:
            self.student_head.v.grad = self.student_head.g.grad = None
        decay = plain_weight_decay(EPOCHS, STEPS_PER_EPOCH, 0.04, 0.4)[step]
        plain_adamw(named.items(), self.moments, plain_rates()[step], decay)
        for param in named.values():
            param.grad = None
        share = BATCH / MOMENTUM_BATCH
        momentum = plain_momentum(EPOCHS, STEPS_PER_EPOCH, MOMENTUM)[step] ** share
        plain_ema(self.teacher, self.student, momentum)
        plain_ema(self.teacher_head, self.student_head, momentum)
        self.center = plain_center(self.center, scores, 0.9**share)


def _plain_head(projector: nn.Module, prototypes: nn.Module, *, learn_scale: bool = False) -> PlainHead:
    head = PlainHead(VIT.width, prototypes=24, hidden=20, bottleneck=8, learn_scale=learn_scale).double()
    sources: Sequence[Tensor] = [*projector.parameters(), *prototypes.parameters()]
    with torch.no_grad():
        for own, source in zip([*head.mlp.parameters(), head.v, head.g], sources, strict=True):
            own.copy_(source)
    return head


def _head_names(head: PlainHead, projector: str, prototypes: str) -> dict[str, Tensor]:
    # In the MLP of `Projector` a GELU stands between two layers.
    layers = {
        f"{projector}.mlp.{2 * index}.{kind}": param
        for index, layer in enumerate(head.mlp)
        for kind, param in layer.named_parameters()
    }
    return {**layers, f"{prototypes}.weight_v": head.v, f"{prototypes}.weight_g": head.g}
