"""Training on a device without values, torch's `meta`: it takes every branch for a GPU.

Reading a value (`item`, `bool`, `nonzero`) raises there by itself. `Watch` sees the rest: copies that a host would wait
for, tensors of the host in work of the device, and the kernels that a GPU would have to start.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import DataFacts
from opsin.data.loading import LoadingPlan, TrainingData
from opsin.data.order import Order
from opsin.data.quarantine import Quarantine
from opsin.run.recipe import read
from opsin.training.optim import build_optimizer, schedule_setter
from opsin.training.state import StepPlan, TrainState

META = torch.device("meta")


class Watch(TorchDispatchMode):
    """Counts kernels on the device, and names the lines of opsin that would stop the host."""

    def __init__(self, pinned: Mapping[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.kernels: Counter[str] = Counter()
        self.waits: set[str] = set()
        """Copies to the host, and copies to the device that are not queued: from memory that is not page-locked."""
        self.mixed: set[str] = set()
        """Operations of the device with tensors of the host that have a dimension."""
        self._pinned = pinned

    @property
    def total(self) -> int:
        return self.kernels.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        there, here = [t for t in given if t.is_meta], [t for t in given if not t.is_meta]
        if name in ("_to_copy", "copy_", "_local_scalar_dense"):
            self._copied(name, args, kwargs, there, here)
        elif there and any(t.ndim for t in here):
            self.mixed.add(f"{name}, {_line()}")
        if name.startswith("_fused_"):  # without a kernel for meta; it only writes in its arguments
            self.kernels[name] += 1
            return None
        out = func(*args, **kwargs)
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        if any(t.is_meta for t in (*given, *made)) and not func.is_view and name not in _NO_KERNEL:
            self.kernels[name] += 1
        return out

    def _copied(self, name: str, args: Any, kwargs: Any, there: list[Tensor], here: list[Tensor]) -> None:
        if name == "_to_copy":
            to, waits = torch.device(kwargs.get("device") or args[0].device), not kwargs.get("non_blocking")
            crosses = to.type != args[0].device.type
        else:
            to, waits = args[0].device, len(args) < 3 or not args[2]
            crosses = bool(there and here)
        if not crosses:
            return
        if to.type != "meta" or waits or any(t.untyped_storage().data_ptr() not in self._pinned for t in here):
            self.waits.add(f"copy to {to.type}, {_line()}")


_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")


def _line() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and "/opsin/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "torch" if frame is None else f"{frame.f_code.co_filename.partition('/opsin/')[2]}:{frame.f_lineno}"


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Watch work on meta. Page-locked memory, which exists only with a GPU, is ordinary memory that is remembered."""
    pinned: dict[int, Tensor] = {}

    def pin(tensor: Tensor) -> Tensor:
        copy = tensor.clone(memory_format=torch.preserve_format)
        pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: tensor.untyped_storage().data_ptr() in pinned)
    with Watch(pinned) as seen:
        yield seen


def allow_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused optimizers and autocast refuse meta; neither needs a value."""
    from torch.optim import adam, optimizer, sgd
    from torch.utils import _foreach_utils

    autocast, asked = torch.autocast, torch.is_autocast_enabled
    for module in (_foreach_utils, adam, optimizer, sgd):
        if hasattr(module, "_get_fused_kernels_supported_devices"):
            monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["cpu", "cuda", "meta"])
    monkeypatch.setattr(torch, "autocast", lambda kind, **k: nullcontext() if kind == "meta" else autocast(kind, **k))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and asked(kind))


class Noise:
    """A source of random pictures of one size."""

    name = "noise"
    classes: tuple[str, ...] = tuple("0123456789")

    def __init__(self, side: int, *, count: int) -> None:
        self._pictures = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        self.labels = torch.arange(count) % len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor:
        return self._pictures[index]

    def location(self, index: int) -> str:
        return str(index)


@dataclass(frozen=True, slots=True)
class Training:
    """A shipped recipe that trains on meta, as far as its first batch."""

    data: TrainingData
    state: TrainState
    plan: StepPlan


def training_of(name: str, *changes: str, batch_size: int, resident: bool) -> Training:
    """The recipe `name` on meta; its pictures are noise of the size of its images."""
    recipe = read(name, ["data.path=x", *changes])
    size = recipe.data.image_size
    source = Noise(size, count=2 * batch_size)
    # As many as ImageNet has: DINO chooses by their number.
    facts = DataFacts(source.classes, 1_281_167, size, 3, (0.5,) * 3, (0.5,) * 3)
    method = recipe.method.build(recipe.model, facts).train().to(META)
    timeline = Timeline([Stage(epochs=2, batch_size=batch_size, steps_per_epoch=2)])
    loading = LoadingPlan(source=source, facts=facts, device=META, resident=resident)
    order = Order(seed=0, labels=source.labels, timeline=timeline, drop_last=True)
    data = TrainingData(loading, [method.views(size)], order, Quarantine(None, total=len(source), limit=0))
    plan = StepPlan(
        forward=method,
        clock=timeline.clock,
        set_schedule=schedule_setter(recipe.optim, method),
        autocast=nullcontext,
        seed=0,
        clip_norm=recipe.optim.clip_norm,
        clip_each=recipe.optim.clip == "each",
    )
    return Training(data, TrainState(method, build_optimizer(recipe.optim, method)), plan)
