"""The process of a variant: it trains one stage of a recipe, and answers each request with a rate.

    python -m opsin.tuning.probe RECIPE.yaml STAGE MEMORY_FRACTION

It says that it is ready, or which fault it met. Each line on its standard input is a number of seconds to measure; an
empty one, or the end of the input, ends it. Answers are lines of JSON.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TextIO

import torch

from opsin.data.base import Batch
from opsin.errors import OpsinError, is_out_of_memory
from opsin.processes.headroom import find_rooms, held_bytes, own_limit
from opsin.processes.trail import end_with_supervisor
from opsin.run.assemble import temporary_run
from opsin.run.images import num_workers
from opsin.run.pace import endless_stage, silent_console, stream, train_on
from opsin.run.recipe import Recipe, read
from opsin.training.loop import Run
from opsin.training.precision import choose_device, gpu_room, limit_gpu, peak_memory_bytes
from opsin.training.state import TrainState

_WARM_UP = 2
_TOGETHER_S = 0.1
_LONGEST_REASON = 300


@dataclass(frozen=True, slots=True)
class Ready:
    """A process that has made its first updates."""

    start_s: float
    """Seconds from the recipe to the end of these updates."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Updates that were measured."""

    images: int
    seconds: float
    peak_bytes: int
    """The most memory that the process has held so far: on the GPU, or resident on the CPU."""
    free_bytes: int | None
    """Memory that is left for other processes; None where the system does not say."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The end of a process."""

    reason: str
    is_memory: bool = False
    """True if it had too little memory."""


Answer = Ready | Measured | Fault
_KINDS: dict[str, type[Answer]] = {kind.__name__: kind for kind in (Ready, Measured, Fault)}


def to_line(answer: Answer) -> str:
    """The answer as a line of JSON."""
    return json.dumps({"kind": type(answer).__name__, **asdict(answer)})


def from_line(line: str) -> Answer:
    """The answer in a line that `to_line` made."""
    facts = json.loads(line)
    return _KINDS[facts.pop("kind")](**facts)


def serve(recipe: Recipe, stage: int, fraction: float, requests: TextIO) -> Iterator[Answer]:
    """Train `stage` of `recipe` within a fraction of the memory that is free, and answer requests."""
    started = time.perf_counter()
    device = choose_device(recipe.device)
    memory = recipe.memory.model_copy(update={"on_out_of_memory": "stop", "fit": "off"})
    with _limited(device, fraction):
        endless = endless_stage(recipe.model_copy(update={"memory": memory}), stage)
        with temporary_run(endless, silent_console()) as run:
            state = run.start.fresh()
            with closing(stream(run)) as batches:
                train_on(state, run, islice(batches, _WARM_UP))
                yield Ready(time.perf_counter() - started)
                for line in requests:
                    if not line.strip():
                        return
                    # Workers have filled their queues since the last request: this work is not to be counted.
                    for _ in islice(batches, num_workers(recipe) * recipe.data.prefetch):
                        pass
                    images, seconds = _train(state, run, batches, float(line))
                    peak = peak_memory_bytes(device)
                    yield Measured(images, seconds, peak, _free_bytes(device, peak))


def _train(state: TrainState, run: Run, batches: Iterator[Batch], seconds: float) -> tuple[int, float]:
    """Train for `seconds` after an update that does not count; return the number of images, and the seconds."""
    began = time.perf_counter()
    train_on(state, run, islice(batches, 1))
    # A device is waited for after several updates, as in training.
    together = max(1, int(_TOGETHER_S / (time.perf_counter() - began)))
    began, images, passed = time.perf_counter(), 0, 0.0
    while images == 0 or passed < seconds:
        images += train_on(state, run, islice(batches, together))
        passed = time.perf_counter() - began
    return images, passed


def _limited(device: torch.device, fraction: float) -> AbstractContextManager[None]:
    """Inside, an allocation beyond a fraction of the free memory fails in this process."""
    limit_gpu(device, fraction)
    return own_limit([replace(room, num_bytes=int(fraction * room.num_bytes)) for room in find_rooms()])


def _free_bytes(device: torch.device, held: int) -> int | None:
    room = gpu_room(device)
    if room is not None:
        return room - held
    return min((room.num_bytes - held_bytes() for room in find_rooms() if room.owner == "machine"), default=None)


def main(recipe: str, stage: str, fraction: str) -> None:
    """Serve requests on the standard streams; libraries that print reach standard error."""
    end_with_supervisor()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        for answer in serve(read(recipe), int(stage), float(fraction), sys.stdin):
            print(to_line(answer), file=answers)
    except Exception as error:
        is_memory = is_out_of_memory(error.__cause__ or error)
        reason = error.faults[0] if isinstance(error, OpsinError) else f"{type(error).__name__}: {error}"
        short = "out of memory" if is_memory else " ".join(reason.split())[:_LONGEST_REASON]
        print(to_line(Fault(short, is_memory)), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
