"""Optimizers: the settings, the parameter groups, and what a step of the schedule sets.

torch's fused kernels and `Muon` can cancel an update on the device (`found_inf`) while the host does not wait. The
transactional step relies on that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.optim import Optimizer

from opsin.clock.schedule import Cosine, Momentum, OneCycle, Schedule, cosine
from opsin.clock.timeline import Clock
from opsin.methods.base import Method, ParamGroup
from opsin.settings.family import Family
from opsin.training.muon import Muon
from opsin.training.state import ScheduledValues

Rate = Annotated[float, Field(gt=0)]
_LINEAR_RATE, _LINEAR_BATCH, _LINEAR_LIMIT = 0.1, 256, 0.4


class OptimConfig(Family, ABC):
    """The optimizer, its learning rate over the run, and the limit of the gradient."""

    lr: Rate | str
    """Peak learning rate; `auto` finds it before the run begins (`opsin tune lr`)."""
    lr_batch_size: int | None = Field(None, gt=0)
    """The batch size of `lr`: with another one, `lr` is scaled in proportion; null for no scaling."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices and filters; biases, norms and all 1-D parameters have none."""
    weight_decay_end: float | None = Field(None, ge=0)
    """The decay at the end of the run, reached along half a cosine; null for a constant decay."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each layer of the backbone to the layer before it; 1 for none."""
    clip_norm: float | None = Field(None, gt=0)
    """The largest norm of the gradient, which is scaled down to it; null for no limit."""
    clip: Literal["whole", "each"] = "whole"
    """The norm that `clip_norm` limits: `whole` is that of the whole gradient, `each` that of each parameter."""
    schedule: Schedule = Cosine()
    """Factor on the learning rate over the run."""

    @model_validator(mode="after")
    def _scales_a_number(self) -> "OptimConfig":
        if isinstance(self.lr, str) and self.lr_batch_size is not None:
            raise ValueError(
                f"lr '{self.lr}' goes by the batch size already; leave lr_batch_size out, or give lr a number"
            )
        return self

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate that the schedule multiplies, for batches of this size."""
        assert not isinstance(self.lr, str), "found before the run is built"
        return self.lr * self.batch_scale(batch_size)

    def batch_scale(self, batch_size: int) -> float:
        """Factor on learning rates for batches of this size."""
        return batch_size / self.lr_batch_size if self.lr_batch_size else 1.0

    def base_lr(self, group: ParamGroup, batch_size: int) -> float:
        """The learning rate of one group that the schedule multiplies, before the factor of the group."""
        return self.peak_lr(batch_size)

    def decay_at(self, clock: Clock) -> float:
        """The weight decay for the update at `clock`, of groups with decay."""
        if self.weight_decay_end is None:
            return self.weight_decay
        return cosine(clock.epoch / clock.total_epochs, self.weight_decay, self.weight_decay_end)

    @property
    @abstractmethod
    def default_momentum(self) -> float:
        """The momentum (beta1) if no schedule sets it."""

    def set_momentum(self, group: dict[str, Any], momentum: float) -> None:
        """Write a scheduled momentum into one of torch's parameter groups."""
        group["momentum"] = momentum

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer over torch's parameter-group dicts.

        Its state is initialised if torch would leave it undefined after a cancelled first update. That of AdamW is zero
        then; it begins with the first gradient of a parameter, so that frozen layers need no memory for it.
        """


class AdamW(OptimConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    lr: Rate | Literal["auto"] = 1e-3
    """Peak learning rate; `auto` finds it before the run begins (`opsin tune lr`)."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay of matrices and filters; biases, norms and all 1-D parameters have none."""
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """The number that is added to the root of the second moment."""

    @property
    def default_momentum(self) -> float:
        return self.betas[0]

    def set_momentum(self, group: dict[str, Any], momentum: float) -> None:
        group["betas"] = (momentum, self.betas[1])

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, fused=True)


class SGD(OptimConfig):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: Rate | Literal["auto", "linear"] = 0.1
    """Peak learning rate; `auto` finds it before the run begins, `linear` is min(0.1 x batch size / 256, 0.4)."""
    weight_decay: float = Field(5e-4, ge=0)
    """Decay of matrices and filters; biases, norms and all 1-D parameters have none."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the velocity."""
    nesterov: bool = True
    """Use Nesterov momentum: the gradient looks ahead along the velocity."""

    @model_validator(mode="after")
    def _has_what_is_cycled(self) -> "SGD":
        if self.momentum == 0 and isinstance(self.schedule, OneCycle) and self.schedule.momentum is not None:
            raise ValueError("momentum 0 cannot be cycled; give a momentum above 0, or schedule.momentum=null")
        return self

    def peak_lr(self, batch_size: int) -> float:
        if self.lr == "linear":
            # Goyal et al. 2017, section 2.1, with a ceiling.
            return min(_LINEAR_RATE * batch_size / _LINEAR_BATCH, _LINEAR_LIMIT)
        return super().peak_lr(batch_size)

    @property
    def default_momentum(self) -> float:
        return self.momentum

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        nesterov = self.nesterov and self.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=self.momentum, nesterov=nesterov, fused=True)
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
    lr: Rate | Literal["auto"] = 0.02
    """Peak learning rate of hidden filters and matrices; `auto` finds it, and scales `other_lr` with it."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay rate of the velocity of hidden filters and matrices."""
    unit_filters: bool = False
    """Scale hidden weights to a fixed length after each update; for networks with a norm after each layer."""
    newton_schulz_steps: int = Field(5, ge=1)
    """Steps of the iteration that makes a direction orthogonal; three suffice for small networks."""
    other_lr: float = Field(0.05, gt=0)
    """Peak learning rate of first layer, head, biases and norms."""
    other_momentum: float = Field(0.85, ge=0, lt=1)
    """Decay rate of the velocity of first layer, head, biases and norms; no schedule changes it."""

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        own = [{**group, "momentum": self.momentum if group["hidden"] else self.other_momentum} for group in groups]
        return Muon(
            own,
            lr=0.0,
            momentum=self.momentum,
            unit_filters=self.unit_filters,
            newton_schulz_steps=self.newton_schulz_steps,
        )

    @property
    def default_momentum(self) -> float:
        return self.momentum

    def set_momentum(self, group: dict[str, Any], momentum: float) -> None:
        if group["hidden"]:
            group["momentum"] = momentum

    def base_lr(self, group: ParamGroup, batch_size: int) -> float:
        return self.peak_lr(batch_size) if group.hidden else self.other_lr * self.batch_scale(batch_size)


def build_optimizer(config: OptimConfig, method: Method) -> Optimizer:
    """Return the optimizer over the groups of `method`; every trainable parameter is in exactly one."""
    groups = _groups(config, method)
    seen = [id(param) for group in groups for param in group.params]
    assert len(seen) == len(set(seen)), "a parameter stands in two groups"
    missing = {id(p): n for n, p in method.named_parameters() if p.requires_grad and id(p) not in set(seen)}
    assert not missing, f"parameters without a group: {sorted(missing.values())[:5]}"
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


def schedule_setter(config: OptimConfig, method: Method) -> Callable[[Optimizer, Clock], ScheduledValues]:
    """Return a function that sets learning rate, decay and momentum of every group, and returns the base values."""
    groups = _groups(config, method)

    def set_schedule(optimizer: Optimizer, clock: Clock) -> ScheduledValues:
        height = config.schedule(clock) * clock.stage.lr_scale
        momentum = config.schedule.momentum_at(clock)
        decay = config.decay_at(clock)
        for settings, group in zip(optimizer.param_groups, groups, strict=True):
            factor = group.lr_factor(clock) if callable(group.lr_factor) else group.lr_factor
            settings["lr"] = config.base_lr(group, clock.stage.batch_size) * height * factor
            settings["weight_decay"] = decay if group.decay else 0.0
            if momentum is not None:
                config.set_momentum(settings, momentum)
        return ScheduledValues(
            config.peak_lr(clock.stage.batch_size) * height,
            config.default_momentum if momentum is None else momentum,
            decay,
        )

    return set_schedule


def _groups(config: OptimConfig, method: Method) -> list[ParamGroup]:
    """The groups of the method, divided by layers of the backbone if these learn at different rates."""
    if config.layer_decay == 1:
        return list(method.param_groups())
    layers = method.trained_backbone.layers()
    last = max(layers.values()) + 1
    layer_of = {id(param): layers[name] for name, param in method.trained_backbone.named_parameters()}
    found: list[ParamGroup] = []
    for group in method.param_groups():
        members: dict[int, list[nn.Parameter]] = {}
        for param in group.params:
            members.setdefault(layer_of.get(id(param), last), []).append(param)
        for layer, params in sorted(members.items()):
            factor = _lr_factor(group, config.layer_decay ** (last - layer))
            found.append(replace(group, name=f"{group.name}.{layer}", params=params, lr_factor=factor))
    return found


def _lr_factor(group: ParamGroup, layer_factor: float) -> float | Callable[[Clock], float]:
    own = group.lr_factor
    return (lambda clock: own(clock) * layer_factor) if callable(own) else own * layer_factor
