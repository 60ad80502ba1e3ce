"""The most memory that a piece of work holds at once, in bytes.

    python benchmarks/memory_peak.py        measures known allocations and checks the answers

What counts on the CPU: every block that torch's own allocator hands out and takes back during the call, as the
profiler reports it: outputs, tensors kept for the backward pass, gradients, optimizer state, temporaries inside
operators. What does not: scratch of oneDNN, MKL and worker threads that bypasses that allocator, Python objects,
and memory that is free but kept for later (the process may hold more).

What counts on CUDA: the live blocks of the caching allocator, in its units of 512 bytes.

The peak is above the level at the start of the call. Two steps that keep different things between calls, such as
gradients, therefore compare only as wholes: let `fn` build the model and take two steps, with `warmup=0`.
"""

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "activation_peak"


def activation_peak(fn: Callable[[], object], *, device: str = "cpu", warmup: int = 1) -> int:
    """Bytes of live tensors at the worst moment of `fn()`, above those that lived when it began.

    `fn` is first called `warmup` times. On the CPU the release of a block is seen only if its allocation was, here
    or in the warm-up: what `fn` releases from before both takes nothing off the level.
    """
    if torch.device(device).type == "cuda":
        return _cuda_peak(fn, device, warmup)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(warmup):
            fn()
        with record_function(_MARK):
            fn()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    (start_ns,) = [event.start_ns() for event in events if event.name() == _MARK]
    memory = [event for event in events if event.name() == "[memory]" and event.start_ns() >= start_ns]
    # The sort is stable: events of one nanosecond keep the order in which they were recorded.
    memory.sort(key=lambda event: event.start_ns())
    return highest_level(event.nbytes() for event in memory)


def highest_level(changes: Iterable[int]) -> int:
    """The highest sum of the first changes, at least 0."""
    level = highest = 0
    for change in changes:
        level += change
        highest = max(highest, level)
    return highest


def _cuda_peak(fn: Callable[[], object], device: str, warmup: int) -> int:
    for _ in range(warmup):
        fn()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def _floats(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * 250_000)


def _one_freed_then_two() -> None:
    first = _floats(100)
    del first
    second, third = _floats(50), _floats(50)
    del second, third


def _three_overlapping() -> None:
    first, second = _floats(40), _floats(30)
    del first
    third = _floats(60)  # 30 + 60
    del second, third


def _kept_for_backward() -> None:
    x = torch.ones(2_500_000, requires_grad=True)  # 10 MB
    y = x.exp()  # 20 MB: exp keeps its result
    z = y.exp()  # 30 MB
    del y
    z.backward(torch.ones_like(z))  # 60 MB: the ones and two gradients on top, none of them in place


def main() -> None:
    kept: list[torch.Tensor] = []

    def replace_the_kept() -> None:
        kept.clear()  # 80 MB of the call before
        kept.append(_floats(100))
        kept[0] = kept[0][:1].clone()  # 100 MB released, the next call starts with 4 bytes
        kept.append(_floats(80))

    def return_the_result() -> torch.Tensor:
        return _floats(70)

    known = [
        ("100 MB freed, then 2 x 50 MB", _one_freed_then_two, 100),
        ("40 + 30, free 40, + 60", _three_overlapping, 90),
        ("80 MB of the warm-up freed, then 100 MB", replace_the_kept, 20),
        ("70 MB returned", return_the_result, 70),
        ("two exp of 10 MB and their backward pass", _kept_for_backward, 60),
    ]
    for name, fn, expected_mb in known:
        measured_mb = activation_peak(fn) / 1e6
        print(f"{name:45s} {measured_mb:7.2f} MB, expected {expected_mb}")
        # Scalars and the like may add a little.
        assert abs(measured_mb - expected_mb) < 0.01, f"{name}: {measured_mb} MB instead of {expected_mb}"


if __name__ == "__main__":
    main()
