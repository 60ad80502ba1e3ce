"""DINO's training step in plain torch, to compare a faster implementation with.

Written from the published recipe (Caron et al. 2021, facebookresearch/dino) with loops in place of clever
tensors, and independent of `opsin`. Every function keeps the dtype it is given; tests use float64.

The order within a step: set lr and weight decay, forward, loss, backward, `plain_clip`, gradients of a frozen last
layer to None, `plain_adamw`, `plain_ema`. The loss uses the center of the step before; `plain_center` follows it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

# B images, D input width, d bottleneck width, K prototypes


class PlainHead(nn.Module):
    """Logits over K prototypes from features: MLP, L2 norm, prototypes of length `g` along `v`.

    Without `learn_scale` the lengths stay 1 and the logits are cosines, between -1 and 1.
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        self.mlp = nn.Sequential()
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            self.mlp.append(linear)
        bound = 1 / math.sqrt(bottleneck)  # the default of nn.Linear
        self.v = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-bound, bound))  # [K, d]
        self.g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=learn_scale)  # [K, 1]

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, K] of `features` [B, D]."""
        x = features
        for i, linear in enumerate(self.mlp):
            x = linear(gelu(x) if i > 0 else x)  # [B, hidden], at last [B, d]
        x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        weight = self.g * self.v / self.v.norm(dim=1, keepdim=True)  # [K, d]
        logits: Tensor = x @ weight.T  # [B, K]
        return logits


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), Phi the distribution function of the standard normal; not the tanh approximation."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def plain_loss(
    student_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    center: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and the mean [K] of the teacher's raw logits, for `plain_center`.

    `student_logits` hold [B, K] per view, the two global views first; `teacher_logits` hold [B, K] per global view;
    `center` is [K], from before this step. The mean is over pairs of different views: with V views, 2 V - 2 pairs.
    """
    pairs = []
    for i, teacher in enumerate(teacher_logits):
        q = torch.softmax((teacher.detach() - center) / teacher_temperature, dim=1)  # [B, K]
        for j, student in enumerate(student_logits):
            if i == j:
                continue
            log_p = torch.log_softmax(student / student_temperature, dim=1)  # [B, K]
            pairs.append(-(q * log_p).sum(dim=1).mean())
    loss = torch.stack(pairs).sum() / len(pairs)
    batch_mean = torch.cat([teacher.detach() for teacher in teacher_logits]).mean(dim=0)  # [K]
    return loss, batch_mean


def plain_center(center: Tensor, batch_mean: Tensor, momentum: float = 0.9) -> Tensor:
    """The center [K] of the next step. `batch_mean` is over both global views and the images of all ranks."""
    return momentum * center + (1 - momentum) * batch_mean


def plain_clip(params: Iterable[Tensor], limit: float) -> list[float]:
    """Gradients scaled in place, each tensor on its own, to a norm of at most `limit`; their norms before that.

    A limit of 0 changes nothing. Tensors without a gradient are left out.
    """
    norms = []
    for param in params:
        if param.grad is None:
            continue
        norm = math.sqrt(float((param.grad**2).sum()))
        norms.append(norm)
        coefficient = limit / (norm + 1e-6)
        if limit > 0 and coefficient < 1:
            param.grad = param.grad * coefficient
    return norms


@dataclass
class Moments:
    """What AdamW remembers of one parameter. The steps count only the updates of this parameter."""

    first: Tensor
    second: Tensor
    steps: int = 0


def decays(name: str, param: Tensor) -> bool:
    """Whether weight decay applies. It does to class token, position embedding and `g`: they have 2 or 3 dimensions."""
    return param.ndim > 1 and not name.endswith("bias")


@torch.no_grad()
def plain_adamw(
    named_params: Iterable[tuple[str, Tensor]],
    moments: dict[str, Moments],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One AdamW update, in place. `moments` is filled as needed: start with an empty dict and keep it.

    A parameter whose gradient is None is skipped whole: neither decay nor moments nor its count of steps move.
    """
    for name, param in named_params:
        grad = param.grad
        if grad is None:
            continue
        if name not in moments:
            moments[name] = Moments(torch.zeros_like(param), torch.zeros_like(param))
        state = moments[name]
        state.steps += 1
        state.first = betas[0] * state.first + (1 - betas[0]) * grad
        state.second = betas[1] * state.second + (1 - betas[1]) * grad**2
        first = state.first / (1 - betas[0] ** state.steps)
        second = state.second / (1 - betas[1] ** state.steps)
        decayed = param * (1 - lr * weight_decay) if decays(name, param) else param
        param.copy_(decayed - lr * first / (second.sqrt() + eps))


@torch.no_grad()
def plain_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The teacher's parameters moved towards the student's, in place. Buffers are not averaged."""
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.copy_(momentum * old + (1 - momentum) * new)


def plain_cosine(
    base: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0, start: float = 0.0
) -> list[float]:
    """One value per step: linear from `start` to `base`, then half a cosine towards `final`.

    The last step of the warm-up and the first after it both have `base`; the last step of all stays short of `final`.
    """
    warmup = plain_line(start, base, warmup_epochs * steps_per_epoch)
    rest = epochs * steps_per_epoch - len(warmup)
    return warmup + [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


def plain_line(first: float, last: float, count: int) -> list[float]:
    """`count` evenly spaced values, both ends included; of one value only the first."""
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def plain_lr(
    base: float, epochs: int, steps_per_epoch: int, warmup_epochs: int = 10, final: float = 1e-6
) -> list[float]:
    """Learning rate per step, 0 at the first. The published `base` is 5e-4 x images per step / 256."""
    return plain_cosine(base, final, epochs, steps_per_epoch, warmup_epochs)


def plain_weight_decay(epochs: int, steps_per_epoch: int, base: float = 0.04, final: float = 0.4) -> list[float]:
    """Weight decay per step."""
    return plain_cosine(base, final, epochs, steps_per_epoch)


def plain_momentum(epochs: int, steps_per_epoch: int, base: float = 0.996) -> list[float]:
    """Momentum of the teacher per step, towards 1."""
    return plain_cosine(base, 1.0, epochs, steps_per_epoch)


def plain_teacher_temperature(
    epochs: int, warmup_epochs: int, warmup: float = 0.04, final: float = 0.04
) -> list[float]:
    """Temperature of the teacher per epoch, not per step: linear over the warm-up, both ends included, then constant.

    The last epoch of the warm-up already has `final`.
    """
    return plain_line(warmup, final, warmup_epochs) + [final] * (epochs - warmup_epochs)
