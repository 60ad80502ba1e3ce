"""The time of an update by part, measured without waiting for the device."""

import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function


def span(part: str) -> AbstractContextManager[object]:
    """A context whose time a profile gives to `part`. Without a profile it costs less than a microsecond."""
    is_recorded = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]  # not in torch's stubs
    return record_function(part) if is_recorded else nullcontext()


class Stopwatch:
    """Moments of one update. On a GPU they are events in its queue, read together with the values of the update."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._now()
        self._laps: list[tuple[str, float | torch.cuda.Event]] = []

    def lap(self, name: str) -> None:
        """Name the work since the last lap."""
        self._laps.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """The time of each name. On a GPU the update must have been waited for."""
        found: dict[str, float] = {}
        before = self._start
        for name, now in self._laps:
            found[name] = found.get(name, 0.0) + _between(before, now)
            before = now
        return found

    def _now(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between(before: "float | torch.cuda.Event", now: "float | torch.cuda.Event") -> float:
    if isinstance(before, float) and isinstance(now, float):
        return now - before
    assert not isinstance(before, float)
    assert not isinstance(now, float)
    return float(before.elapsed_time(now)) / 1000
