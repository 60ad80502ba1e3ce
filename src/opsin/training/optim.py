"""Optimizers: the settings, the parameter groups, and what a step of the schedule sets.

Both rules use torch's fused kernels, which can cancel an update on the device (`found_inf`)
without the host waiting for the answer: the transactional step stands on that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch.optim import Optimizer

from opsin.config import Family
from opsin.methods.base import Method, ParamGroup
from opsin.schedule import Cosine, Schedule
from opsin.timeline import Clock


class OptimConfig(Family, ABC):
    """The optimizer, its learning rate over time, and the clip of the gradient."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices and filters; biases, norms and all 1-D parameters have none."""
    clip_norm: float | None = Field(None, gt=0)
    """Scale the whole gradient down to this norm where it is larger; null for no clip."""
    schedule: Schedule = Cosine()
    """Factor on the learning rate over the run."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer over torch's parameter-group dicts, with its state laid out."""


class AdamW(OptimConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay of matrices and filters; biases, norms and all 1-D parameters have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


class SGD(OptimConfig):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(5e-4, ge=0)
    """Decay of matrices and filters; biases, norms and all 1-D parameters have none."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the velocity."""
    nesterov: bool = True
    """Look ahead along the velocity."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        nesterov = self.nesterov and self.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=nesterov, fused=True)
        if self.momentum > 0:
            # torch leaves the velocity unset until the first step and would take uninitialised memory
            # for it if that step were cancelled. Zero is the same start: velocity = 0.9 * 0 + gradient.
            for group in optimizer.param_groups:
                for param in group["params"]:
                    optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
        return optimizer


def build_optimizer(config: OptimConfig, method: Method) -> Optimizer:
    """The optimizer over the groups of `method`; every trainable parameter stands in exactly one."""
    groups = method.param_groups()
    _check_groups(method, groups)
    return config.build(
        [
            {
                "params": list(group.params),
                "weight_decay": config.weight_decay if group.decay else 0.0,
                "group_name": group.name,
            }
            for group in groups
        ]
    )


def lr_setter(config: OptimConfig, method: Method) -> Callable[[Optimizer, Clock], float]:
    """A function that sets every group's learning rate for a clock and gives the base rate."""
    factors = [group.lr_factor for group in method.param_groups()]

    def set_lr(optimizer: Optimizer, clock: Clock) -> float:
        lr = config.lr * config.schedule(clock)
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = lr * (factor(clock) if callable(factor) else factor)
        return lr

    return set_lr


def _check_groups(method: Method, groups: Sequence[ParamGroup]) -> None:
    seen = [id(param) for group in groups for param in group.params]
    assert len(seen) == len(set(seen)), "a parameter stands in two groups"
    missing = {id(p): n for n, p in method.named_parameters() if p.requires_grad and id(p) not in set(seen)}
    assert not missing, f"parameters without a group: {sorted(missing.values())[:5]}"
