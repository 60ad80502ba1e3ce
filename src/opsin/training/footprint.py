"""The memory of an update before it is made: the update itself runs on tensors without content, and they are counted.

Such a tensor (`FakeTensor`) has the shape, format and device of a real one. Whatever the method, the optimizer and
autocast would allocate through torch is counted at any size, in about a second. Memory that is allocated without torch
is not: scratch of kernels, and the gaps between blocks.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from opsin.clock.timeline import Clock
from opsin.data.base import Batch, Blend, Views
from opsin.methods.base import Losses, Method
from opsin.nn.ema import ModelEma
from opsin.training.freeze import LayerFreezer
from opsin.training.memory import PartFallback
from opsin.training.optim import OptimConfig, build_optimizer, schedule_setter
from opsin.training.state import LossScale, StepPlan, TrainState
from opsin.training.step import train_step

_ENTER, _LEAVE = "profiler::_record_function_enter_new", "profiler::_record_function_exit"
_UNKNOWN = {torch.bool: True}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of tensors in an update at its worst moment, without the images; all on the device of the method."""

    weights: int
    """Parameters that learn."""
    others: int
    """Parameters that do not learn (of a teacher), and buffers."""
    averaged: int
    """The averaged weights."""
    moments: int
    """The state of the optimizer."""
    gradients: int
    activations: int
    """Tensors of the forward and the backward pass, without the next two."""
    teacher: int
    """The forward pass of a teacher."""
    loss: int
    """Scores, and what else the loss holds."""

    @property
    def state(self) -> int:
        """Bytes that stay between updates, and that a checkpoint holds."""
        return self.weights + self.others + self.averaged + self.moments

    @property
    def transient(self) -> int:
        """Bytes that an update takes and gives back."""
        return self.gradients + self.activations + self.teacher + self.loss


@dataclass(frozen=True, slots=True)
class UpdateTrial:
    """An update to be tried. The real `method` is only looked at."""

    method: Method
    optim: OptimConfig
    plan: StepPlan
    """As for the real update; `accumulate` and `view_chunk` are those of the trial."""
    averages: bool = False
    """True if averaged weights are kept."""
    scales_loss: bool = False
    """True with fp16."""
    checkpoint_blocks: bool = False

    def run(self, views: Views, masks: Mapping[str, Tensor], *, images: int, step: int) -> Footprint:
        """The footprint of update `step` with parts of `images` images each.

        `masks` are those of as many images.

        Raises:
            Exception: the method does something that depends on the content of tensors, or torch cannot count.
        """
        mode, live = FakeTensorMode(allow_non_fake_inputs=True), _Live()
        method = _empty_copy(self.method, mode)
        with torch.random.fork_rng([]), mode:
            if self.checkpoint_blocks:
                method.checkpoint_blocks()
            method.train()
            state = TrainState(method, build_optimizer(self.optim, method), step=step)
            state.ema = ModelEma(method) if self.averages else None
            device = next(method.parameters()).device
            state.loss_scale = LossScale.start(device) if self.scales_loss else None
            batch = _empty_batch(views, masks, images, device)
            with live:
                train_step(state, batch, self._plan(method, live))
        learning = {id(param) for param in method.parameters() if param.requires_grad}
        tensors = [*method.parameters(), *method.buffers()]
        weights = sum(param.nbytes for param in tensors if id(param) in learning)
        # Both are made in the first update and kept: in every later one they are there from the beginning.
        moments = _state_bytes(state)
        at_peak = live.at_peak - Counter(optimizer=moments)
        made = min(at_peak["backward"] + at_peak["optimizer"], weights)
        return Footprint(
            weights=weights,
            others=sum(tensor.nbytes for tensor in tensors) - weights,
            averaged=0 if state.ema is None else sum(tensor.nbytes for tensor in tensors),
            moments=moments,
            # From the second part on, those of the parts before are there from the beginning.
            gradients=made if self.plan.accumulate == 1 else weights,
            activations=at_peak.total() - made - at_peak["teacher forward"] - at_peak["loss"],
            teacher=at_peak["teacher forward"],
            loss=at_peak["loss"],
        )

    def encode(self, size: int, *, images: int) -> int:
        """Bytes that the features of `images` images of `size` pixels take while they are computed."""
        mode, live = FakeTensorMode(allow_non_fake_inputs=True), _Live()
        method = _empty_copy(self.method, mode).eval()
        with torch.no_grad(), mode:
            pixels = torch.empty(images, method.backbone.channels, size, size, device=next(method.parameters()).device)
            with live, self.plan.autocast():
                method.encode(pixels)
        return live.at_peak.total()

    def _plan(self, method: Method, live: "_Live") -> StepPlan:
        def forward(batch: Batch, clock: Clock) -> Losses:
            live.phase = ["forward"]
            losses: Losses = method(batch, clock)
            live.phase = ["backward"]
            return losses

        def show_gradients(method: Method, step: int) -> None:
            live.phase = ["optimizer"]

        return replace(
            self.plan,
            forward=forward,
            set_schedule=schedule_setter(self.optim, method),
            set_layers=LayerFreezer(method),
            show_gradients=show_gradients,
            accumulate=1,
            fallback=PartFallback(),
        )


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside, and of those at the worst moment, by phase."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.phase = ["forward"]
        self.at_peak: Counter[str] = Counter()
        self._by_phase: Counter[str] = Counter()
        self._total = self._peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if name == "aten::_local_scalar_dense":
            # A number that the host reads. None is known, and sizes hardly depend on it.
            return _UNKNOWN.get(args[0].dtype, 1)
        if name == _ENTER:
            self.phase.append(args[0])
        elif name.startswith(_LEAVE) and len(self.phase) > 1:
            self.phase.pop()
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor):
                self._count(one)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, phase = storage.nbytes(), self.phase[-1]
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size, phase)
        self._by_phase[phase] += size
        self._total += size
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, self._by_phase.copy()

    def _forget(self, key: int, size: int, phase: str) -> None:
        self._known.discard(key)
        self._by_phase[phase] -= size
        self._total -= size


def can_checkpoint(method: Method) -> bool:
    """True if the network of `method` has blocks to compute twice; `method` stays as it is."""
    return _empty_copy(method, FakeTensorMode(allow_non_fake_inputs=True)).checkpoint_blocks()


def _empty_copy(method: Method, mode: FakeTensorMode) -> Method:
    """A copy of the method whose tensors have no content."""
    empty: dict[int, Any] = {}
    with mode:
        for tensor in (*method.parameters(), *method.buffers()):
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            is_param = isinstance(tensor, nn.Parameter)
            empty[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_param else made
    return copy.deepcopy(method, empty)


def _empty_batch(views: Views, masks: Mapping[str, Tensor], count: int, device: torch.device) -> Batch:
    """A batch of `count` images; call it inside the mode of such tensors."""
    ids = torch.empty(count, dtype=torch.int64, device=device)
    return Batch(
        {
            name: torch.empty(crop.count, count, 3, crop.size, crop.size, device=device)
            for name, crop in views.crops.items()
        },
        torch.empty_like(ids),
        ids,
        {name: torch.empty(count, *mask.shape[1:], dtype=mask.dtype, device=device) for name, mask in masks.items()},
        None if views.mix is None else Blend(torch.empty_like(ids), torch.empty(count, device=device)),
    )


def _state_bytes(state: TrainState) -> int:
    kept = [value for values in state.optimizer.state.values() for value in values.values()]
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))
