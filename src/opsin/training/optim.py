"""Optimizers: the settings, the parameter groups, and what a step of the schedule sets.

torch's fused kernels can cancel an update on the device (`found_inf`) without the host waiting for
the answer, and so can `Muon`: the transactional step stands on that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.optim import Optimizer

from opsin.config import Family
from opsin.methods.base import Method, ParamGroup
from opsin.schedule import Cosine, Schedule
from opsin.timeline import Clock
from opsin.training.muon import Muon

Momentum = Annotated[float, Field(ge=0, lt=1)]


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

    def base_lr(self, group: ParamGroup) -> float:
        """The learning rate that the schedule multiplies for this group, before the group's own factor."""
        return self.lr

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
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
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


class MuonConfig(OptimConfig):
    """Orthogonalised momentum inside the network, plain momentum elsewhere (Jordan et al. 2024)."""

    name: Literal["muon"] = "muon"
    lr: float = Field(0.02, gt=0)
    """Peak learning rate of hidden filters and matrices."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay rate of the velocity of hidden filters and matrices."""
    unit_filters: bool = False
    """Scale hidden weights to a fixed length after each update; for networks with a norm after each layer."""
    other_lr: float = Field(0.05, gt=0)
    """Peak learning rate of first layer, head, biases and norms."""
    other_momentum: float = Field(0.85, ge=0, lt=1)
    """Decay rate of the velocity of first layer, head, biases and norms."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        own = [{**group, "momentum": self.momentum if group["hidden"] else self.other_momentum} for group in groups]
        return Muon(own, lr=self.lr, momentum=self.momentum, unit_filters=self.unit_filters)

    def base_lr(self, group: ParamGroup) -> float:
        return self.lr if group.hidden else self.other_lr


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
                "hidden": group.hidden,
            }
            for group in groups
        ]
    )


def lr_setter(config: OptimConfig, method: Method) -> Callable[[Optimizer, Clock], float]:
    """A function that sets every group's learning rate for a clock and gives the base rate."""
    bases = [(config.base_lr(group), group.lr_factor) for group in method.param_groups()]

    def set_lr(optimizer: Optimizer, clock: Clock) -> float:
        height = config.schedule(clock)
        for group, (base, factor) in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * height * (factor(clock) if callable(factor) else factor)
        return config.lr * height

    return set_lr


def _check_groups(method: Method, groups: Sequence[ParamGroup]) -> None:
    seen = [id(param) for group in groups for param in group.params]
    assert len(seen) == len(set(seen)), "a parameter stands in two groups"
    missing = {id(p): n for n, p in method.named_parameters() if p.requires_grad and id(p) not in set(seen)}
    assert not missing, f"parameters without a group: {sorted(missing.values())[:5]}"
