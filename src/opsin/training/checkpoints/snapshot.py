"""The state of a run at one moment, copied so that training can go on while it is written."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsin.storage.teller import Teller
from opsin.training.state import Detour, TrainState

_SLAB = 2**26  # bytes; pinned memory is taken in pieces of at least this size
_ALIGNED = 64  # bytes; where a tensor begins


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The content of a checkpoint, in the memory of the host."""

    step: int
    elapsed_s: float
    detours: tuple[Detour, ...]
    optimizer: str
    """The name of its class."""
    content: Mapping[str, Any]
    """State dicts by part; their tensors share memory in the same way as those of the state."""
    num_bytes: int
    """Size of all tensors."""
    num_tensors: int
    wait: Callable[[], None]
    """Returns when the tensors have their values: copies from a GPU may still be in progress."""


class Buffers:
    """Memory for one copy of a state. It is allocated once and used again for each copy."""

    def __init__(self) -> None:
        self._sizes: tuple[int, ...] = ()
        self._pinned = False
        self._parts: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of the copy that is held."""
        return sum(self._sizes)

    def take(self, sizes: Sequence[int], *, pinned: bool) -> list[Tensor]:
        """Return memory of these sizes in bytes, none of them 0. The memory of an earlier call is invalid then.

        Raises:
            MemoryError: there is not enough; none is held.
        """
        if tuple(sizes) != self._sizes or pinned != self._pinned:
            self._parts, self._sizes = [], ()  # first, so that there are never two copies
            self._parts = _carve(sizes, pinned=pinned)
            self._sizes, self._pinned = tuple(sizes), pinned
        return self._parts


class Snapshots:
    """The snapshots of a run, in memory of their own as long as there is enough."""

    def __init__(self, *, beside: bool, teller: Teller) -> None:
        """`beside` requests memory of their own; `teller` reports that there is not enough."""
        self._buffers = Buffers() if beside else None
        self._teller = teller

    @property
    def beside(self) -> bool:
        """True if training may go on while a snapshot is written."""
        return self._buffers is not None

    def take(self, state: TrainState) -> Snapshot:
        """Take a snapshot of the state. Without memory for a copy, `beside` is false from then on.

        Raises:
            MemoryError: there is not enough even to write it while training waits.
        """
        if self._buffers is not None:
            try:
                return take_snapshot(state, self._buffers)
            except MemoryError as error:
                fault = str(error)
            self._buffers = None
            warning = (
                f"no memory for a copy of the state ({fault}): from here on training waits while a checkpoint is "
                "written, as with checkpoints.background=false"
            )
            self._teller.tell("checkpoint_waits", state.step, warn=warning, warning=warning)
        return take_snapshot(state, None)


def take_snapshot(state: TrainState, buffers: Buffers | None) -> Snapshot:
    """Take a snapshot of the state. With `buffers` all tensors are copied there, and training may go on at once.

    Without, the snapshot has the tensors of a state on the CPU themselves: write it before the next update.

    Raises:
        MemoryError: there is not enough for the copy.
    """
    assert state.whole, "weights and moments belong to different steps"
    scale = state.loss_scale
    content = {
        "method": dict(state.method.state_dict()),
        "optimizer": state.optimizer.state_dict(),
        "loss_scale": None if scale is None else {"scale": scale.scale, "good_steps": scale.good_steps},
        "ema": None if state.ema is None else state.ema.state_dict(),
    }
    sources = _storages(content)
    if buffers is None:
        # A copy only from another device.
        copies = [
            one if one.device.type == "cpu" else _slab(one.nbytes, pinned=False).copy_(one) for one in sources.values()
        ]
        wait: Callable[[], None] = _nothing
    else:
        copies, wait = _copy(list(sources.values()), buffers)
    copy_of = dict(zip(sources, copies, strict=True))
    return Snapshot(
        step=state.step,
        elapsed_s=state.elapsed_s,
        detours=state.detours,
        optimizer=type(state.optimizer).__name__,
        content=_replaced(content, copy_of),
        num_bytes=sum(copy.nbytes for copy in copies),
        num_tensors=len(copies),
        wait=wait,
    )


def _nothing() -> None:
    pass


_StorageKey = tuple[torch.device, int, int]
"""The memory of a tensor: device, address, bytes."""


def _storage_key(tensor: Tensor) -> _StorageKey:
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def _storages(content: object) -> dict[_StorageKey, Tensor]:
    """The memory of all tensors in `content`, as bytes, once each; without empty ones."""
    found: dict[_StorageKey, Tensor] = {}
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.untyped_storage().nbytes() and (key := _storage_key(value)) not in found:
                found[key] = torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.untyped_storage())
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return found


def _replaced(value: Any, copies: Mapping[_StorageKey, Tensor]) -> Any:
    """Return `value` with each tensor as the same view of the copy of its memory."""
    if isinstance(value, Tensor):
        if not value.untyped_storage().nbytes():
            return value.detach().cpu()
        storage = copies[_storage_key(value)].untyped_storage()
        empty = torch.empty(0, dtype=value.dtype)
        return empty.set_(storage, value.storage_offset(), value.shape, value.stride())
    if isinstance(value, Mapping):
        return {name: _replaced(item, copies) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, copies) for item in value)
    return value


def _copy(sources: Sequence[Tensor], buffers: Buffers) -> tuple[list[Tensor], Callable[[], None]]:
    """Copy `sources` into `buffers`; return the copies, and a function that waits for them.

    On a GPU the copies follow the order of its work: after the last update, and before the next one.
    """
    devices = {source.device for source in sources if source.device.type != "cpu"}
    copies = buffers.take([source.nbytes for source in sources], pinned=any(d.type == "cuda" for d in devices))
    for copy, source in zip(copies, sources, strict=True):
        copy.copy_(source, non_blocking=True)
    events = []
    for device in devices:
        # The stream of the copies: by default an event takes that of the current device, which may be another.
        events.append(torch.Event(device))
        events[-1].record(torch.accelerator.current_stream(device))

    def wait() -> None:
        for event in events:
            event.synchronize()

    return copies, wait if events else _nothing


def _carve(sizes: Sequence[int], *, pinned: bool) -> list[Tensor]:
    """Divide as few blocks of memory as possible into pieces, each with a storage of its own."""
    room = [_ALIGNED * math.ceil(size / _ALIGNED) for size in sizes]
    # torch rounds pinned memory up to a power of two; in pieces of such a size, the largest first, little is lost.
    slab_bytes = 1 << (max([_SLAB, *room]) - 1).bit_length() if pinned else sum(room)
    slabs: list[Tensor] = []
    used: list[int] = []
    parts: dict[int, Tensor] = {}
    for index in sorted(range(len(sizes)), key=lambda index: -room[index]):
        chosen = next((n for n, taken in enumerate(used) if taken + room[index] <= slab_bytes), len(slabs))
        if chosen == len(slabs):
            slabs.append(_slab(slab_bytes, pinned=pinned))
            used.append(0)
        memory = slabs[chosen].numpy()
        parts[index] = torch.frombuffer(memory, dtype=torch.uint8, count=sizes[index], offset=used[chosen])
        used[chosen] += room[index]
    return [parts[index] for index in range(len(sizes))]


def _slab(num_bytes: int, *, pinned: bool) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    except (RuntimeError, MemoryError) as error:  # the kind depends on the allocator
        kind = " of page-locked memory" if pinned else ""
        raise MemoryError(f"{num_bytes / 2**20:.1f} MiB{kind} are not free") from error
