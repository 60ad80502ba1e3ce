"""The time of recorded steps by part, from spans and from kernels of a GPU.

All times are nanoseconds of one clock. The time of a part excludes the parts inside it; time outside of all parts is
`other`, so that the parts of a step add up to it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # not in torch's stubs
from torch.profiler import profile as Recording

DATA = "data"
PARTS = (DATA, "teacher forward", "student forward", "loss", "forward", "backward", "optimizer", "teacher update")
"""Names of spans, in the order of a step."""
OTHER = "other"
STEP = "step"
"""The name of the span around all of them."""
_LAUNCHES = ("cuda", "cu", "hip")
"""Prefixes of the names of calls that launch work on a GPU, after underscores: CUDA 13 has `__cudaLaunchKernel`."""


class Event(Protocol):
    """An event of torch's profiler."""

    def name(self) -> str: ...

    def start_ns(self) -> int: ...

    def end_ns(self) -> int: ...

    def correlation_id(self) -> int:
        """The same number for work of a GPU and for the call that launched it."""

    def device_type(self) -> DeviceType: ...

    def is_user_annotation(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Span:
    """Work of the host under a name of `PARTS`, or a whole `STEP`."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """Work of a GPU, and when the host asked for it."""

    launched: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A step in milliseconds. `parts` add up to `total`."""

    total: float
    parts: Mapping[str, float]
    idle: float = 0.0
    """The time in which the GPU did nothing."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The steps of a recording, and how much of the work of a GPU is missing in them."""

    steps: list[StepTimes]
    kernels: int = 0
    """Kernels, copies and fills of a GPU."""
    lost: int = 0
    """Those among them that no recorded call of the host has launched: they belong to no part."""


def read_recording(recording: Recording, *, on_device: bool) -> Recorded:
    """The times of the steps of a recording."""
    assert recording.profiler is not None, "it was started"
    assert recording.profiler.kineto_results is not None, "and stopped"
    return read_events(recording.profiler.kineto_results.events(), on_device=on_device)


def read_events(events: Iterable[Event], *, on_device: bool) -> Recorded:
    """The times of the steps among `events`."""
    spans: list[Span] = []
    launched: dict[int, int] = {}
    work: list[tuple[int, int, int]] = []
    for event in events:
        name, start, end = event.name(), event.start_ns(), event.end_ns()
        on_host = event.device_type() == DeviceType.CPU
        if event.is_user_annotation():
            # On a GPU there is one of each on either side.
            if on_host and name in (*PARTS, STEP):
                spans.append(Span(name, start, end))
        elif not on_host:
            work.append((event.correlation_id(), start, end))
        elif name.lstrip("_").startswith(_LAUNCHES):
            launched[event.correlation_id()] = start
    if not on_device:
        return Recorded(host_times(spans))
    kernels = [Kernel(launched[key], start, end) for key, start, end in work if key in launched]
    return Recorded(device_times(spans, kernels), len(work), len(work) - len(kernels))


def host_times(spans: Sequence[Span]) -> list[StepTimes]:
    """The times of every step among `spans` on the host."""
    found = []
    for step in _steps(spans):
        parts: dict[str, int] = {}
        for piece in _pieces(step, spans):
            parts[piece.name] = parts.get(piece.name, 0) + piece.end - piece.start
        found.append(_in_ms(step.end - step.start, parts))
    return found


def device_times(spans: Sequence[Span], kernels: Sequence[Kernel]) -> list[StepTimes]:
    """The times of every step among `spans` on the GPU: the time of a kernel belongs to the part that launched it.

    A step lasts until its last kernel is done, from the end of the step before, or from its own begin if that is
    later. Time in which the GPU is idle and the host waits for a batch belongs to `data`.
    """
    found = []
    ordered = sorted(kernels, key=lambda kernel: kernel.launched)
    for step in _steps(spans):
        pieces = _pieces(step, spans)
        own = [kernel for kernel in ordered if step.start <= kernel.launched < step.end]
        start = max([step.start, *(kernel.end for kernel in ordered if kernel.launched < step.start)])
        end = max([start, *(kernel.end for kernel in own)]) if own else max(start, step.end)
        parts: dict[str, int] = {}
        idle = 0
        free = start  # all before is given to a part
        for kernel in [*sorted(own, key=lambda kernel: kernel.start), Kernel(step.end, end, end)]:
            if kernel.start > free:
                waited = sum(_shared(piece, free, kernel.start) for piece in pieces if piece.name == DATA)
                parts[DATA] = parts.get(DATA, 0) + waited
                parts[OTHER] = parts.get(OTHER, 0) + kernel.start - free - waited
                idle += kernel.start - free
            begin = max(kernel.start, free)
            if kernel.end > begin:
                name = next(piece.name for piece in pieces if piece.start <= kernel.launched < piece.end)
                parts[name] = parts.get(name, 0) + kernel.end - begin
                free = kernel.end
        found.append(_in_ms(end - start, parts, idle))
    return found


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds of several steps."""

    mean_ms: float
    median_ms: float
    p90_ms: float
    min_ms: float
    max_ms: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one value or more."""
        middle, high = np.percentile(values, (50, 90)).tolist()
        return cls(float(np.mean(values)), middle, high, min(values), max(values))


def summarise(steps: Sequence[StepTimes]) -> dict[str, Spread]:
    """The spread of every part that some step has, in the order of a step, `other` last."""
    return {
        name: Spread.of([step.parts.get(name, 0.0) for step in steps])
        for name in (*PARTS, OTHER)
        if name == OTHER or any(name in step.parts for step in steps)
    }


def _steps(spans: Sequence[Span]) -> Iterator[Span]:
    return (one for one in sorted(spans, key=lambda one: one.start) if one.name == STEP)


def _pieces(step: Span, spans: Sequence[Span]) -> list[Span]:
    """The step cut where spans begin and end, each piece under the name of the innermost span around it."""
    inside = [one for one in spans if one.name != STEP and step.start <= one.start and one.end <= step.end]
    pieces: list[Span] = []
    around = [Span(OTHER, step.start, step.end)]
    now = step.start
    for one in sorted(inside, key=lambda one: (one.start, -one.end)):
        while around[-1].end <= one.start and len(around) > 1:
            closed = around.pop()
            pieces.append(Span(closed.name, now, closed.end))
            now = closed.end
        pieces.append(Span(around[-1].name, now, one.start))
        now = one.start
        around.append(one)
    for closed in reversed(around):
        pieces.append(Span(closed.name, now, closed.end))
        now = closed.end
    return [piece for piece in pieces if piece.end > piece.start]


def _shared(piece: Span, start: int, end: int) -> int:
    return max(0, min(piece.end, end) - max(piece.start, start))


def _in_ms(total: int, parts: Mapping[str, int], idle: int = 0) -> StepTimes:
    return StepTimes(total / 1e6, {name: ns / 1e6 for name, ns in parts.items()}, idle / 1e6)
