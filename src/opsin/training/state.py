"""The state that training changes, the report of an update, and the plan of its execution."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from opsin.clock.timeline import Clock
from opsin.data.base import Batch
from opsin.methods.base import Losses, Method
from opsin.nn.ema import ModelEma
from opsin.training.memory import PartFallback
from opsin.training.stopwatch import Stopwatch


@dataclass
class LossScale:
    """The factor that keeps fp16 gradients in range; it stays on the device, and the host never reads it.

    It is halved after an update with non-finite gradients, doubled after `interval` good ones in a row.
    """

    scale: Tensor
    good_steps: Tensor
    interval: int = 2000

    @classmethod
    def start(cls, device: torch.device, scale: float = 2.0**16) -> "LossScale":
        """A fresh scale on `device`."""
        return cls(torch.tensor(scale, device=device), torch.tensor(0, device=device))

    def update(self, applied: Tensor) -> None:
        """Adapt the scale after an update; `applied` is 1 if it was made, 0 if it was cancelled."""
        good = (self.good_steps + 1) * applied.to(torch.int64)
        grown = good >= self.interval
        factor = torch.where(applied > 0, torch.where(grown, 2.0, 1.0), 0.5)
        self.scale.mul_(factor).clamp_(1.0, 2.0**32)
        self.good_steps.copy_(torch.where(grown, torch.zeros_like(good), good))


@dataclass(frozen=True, slots=True)
class Detour:
    """A way around a fault: steps that are repeated after a rollback, with other images.

    The images of steps `first` to `last` - 1 follow from these numbers, so that a resume repeats them.
    """

    first: int
    """The first step whose images are replaced; training goes back to the newest checkpoint there or before."""
    last: int
    """The first step after the replaced ones."""
    attempt: int
    """1 for the first rollback of a run, 2 for the next."""
    kind: str
    """The finding: `Finding.kind`."""
    lr_factor: float
    """Factor on learning rates in the steps `first` to `lr_until` - 1."""
    lr_until: int


@dataclass
class TrainState:
    """Everything that training changes; a checkpoint is exactly this.

    `elapsed_s` is the training time so far in seconds; it informs logs and limits, never weights.
    """

    method: Method
    optimizer: Optimizer
    loss_scale: LossScale | None = None
    ema: ModelEma | None = None
    step: int = 0
    elapsed_s: float = 0.0
    detours: tuple[Detour, ...] = ()
    """One for each rollback so far, the newest last."""
    whole: bool = True
    """False in the middle of an update, when weights and moments belong to different steps."""

    @property
    def lr_factor(self) -> float:
        """Factor of the detours on learning rates in the next update; 1 without any."""
        return math.prod(one.lr_factor for one in self.detours if one.first <= self.step < one.lr_until)


class Start(Protocol):
    """The beginning of a run."""

    def fresh(self) -> TrainState:
        """The state before step 0, or one whose weights a checkpoint will replace."""

    def over(self, state: TrainState) -> None:
        """Restore the state before step 0, except its detours and its time."""

    def commit(self, step: int) -> None:
        """Apply the recipe from `step` on, and remove later rows and events.

        It follows the search for a state: a recipe that cannot resume must not replace one that can.
        """


@dataclass(frozen=True, slots=True)
class ScheduledValues:
    """The values of the schedules: base learning rate, momentum (beta1 of Adam) and weight decay."""

    lr: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class StepReport:
    """The report of one update. Tensors stay on the device: reading them is the journal's decision."""

    step: int
    """Updates made, this one included."""
    clock: Clock
    """The time before the update."""
    scheduled: ScheduledValues
    values: Mapping[str, Tensor]
    """Scalars: `train/loss`, `train/grad_norm`, `loss/<name>`, `train/<name>`."""
    applied: Tensor
    """1 when weights changed, 0 when a non-finite loss or gradient cancelled the update."""
    ids: Tensor
    images: int
    times: Stopwatch
    """Laps `forward`, `backward` and `optimizer`."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Feature vectors [N, D] by encoder, from the last piece of the batch with features."""


@runtime_checkable
class GradientViewer(Protocol):
    """A monitor that reads gradients, which are gone when an update is reported."""

    def view_gradients(self, method: Method, step: int) -> None:
        """Measure the final gradients of update `step`, without waiting for the device."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The execution of an update; it is never saved, and may differ after a resume."""

    forward: Callable[[Batch, Clock], Losses]
    """The method, or its wrapper for several processes."""
    clock: Callable[[int], Clock]
    set_schedule: Callable[[Optimizer, Clock], ScheduledValues]
    """Sets the scheduled values of every group."""
    autocast: Callable[[], AbstractContextManager[None]]
    seed: int
    set_layers: Callable[[Clock], None] = lambda clock: None
    """Sets which layers learn."""
    show_gradients: Callable[[Method, int], None] = lambda method, step: None
    """Shows the gradients of an update, by its number, to the monitors before the optimizer uses them."""
    ema_decay: Callable[[int], float] = lambda step: 0.0
    """The decay of the averaged weights at a step."""
    accumulate: int = 1
    """The requested number of parts of a batch."""
    fallback: PartFallback = field(default_factory=PartFallback)
    """More parts after memory ran out; without a file the error ends the run."""
    view_chunk: int | None = None
    """Views of an image that are computed forward and backward at a time; None for all."""
    clip_norm: float | None = None
    clip_each: bool = False
    """Clip the gradient of each parameter on its own."""
    rank: int = 0
