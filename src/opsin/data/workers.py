"""Reading, decoding and cutting, in this process or in worker processes.

One task is one batch, addressed by (crops, epoch, ids): its pixels are the same in every process.

Shapes: B images of a batch, C channels, S side of a crop in pixels.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opsin.data.base import Source, UnreadableImage
from opsin.data.quarantine import Failure, Read, read_or_replace
from opsin.data.shared_memory import describe_no_room, reserved
from opsin.data.views.crops import Crop, boxes_for, cut
from opsin.data.waiting import POLL_S, Patience, StopRequest, read_in_threads
from opsin.errors import OpsinError, StoppedWaiting, TransientError, WorkerEnded

_GROUP_BYTES = 64 << 20
_TIMED_OUT = "DataLoader timed out"
"""The beginning of what a loader says that can be asked again."""


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Cut images as they are stored, before colour and normalisation."""

    views: Mapping[str, Tensor]
    """name -> uint8 [count, B, C, S, S]."""
    labels: Tensor
    ids: Tensor
    """int64 [B], the images of the task. An unreadable one has the pixels and the label of its replacement."""
    failures: tuple[Failure, ...] = ()

    def pieces(self, batch_size: int) -> Iterator["RawBatch"]:
        """Yield consecutive pieces of `batch_size` images, the last one smaller; the first has all failures."""
        for first in range(0, max(len(self.ids), 1), batch_size):
            part = slice(first, first + batch_size)
            views = {name: view[:, part] for name, view in self.views.items()}
            yield RawBatch(views, self.labels[part], self.ids[part], () if first else self.failures)

    def share_memory(self) -> None:
        """Move the batch into shared memory, where another process finds it.

        Raises:
            RuntimeError: there is no room.
        """
        for tensor in (*self.views.values(), self.labels, self.ids):
            tensor.share_memory_()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.views.values(), self.labels, self.ids))

    def pin_memory(self) -> "RawBatch":
        """Return the batch in pinned memory, which a GPU copies without waiting."""
        views = {name: view.pin_memory() for name, view in self.views.items()}
        return RawBatch(views, self.labels.pin_memory(), self.ids.pin_memory(), self.failures)


@dataclass(frozen=True, slots=True)
class Task:
    """The crops of a batch: of the images `ids`, int64 [B] on the CPU, as they look in `epoch`."""

    crops: Mapping[str, Crop]
    epoch: int
    ids: Tensor


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads and cuts the images of a batch. Unreadable images are replaced or left out."""

    source: Source
    seed: int
    unreadable: Literal["replace", "leave out"] = "replace"
    interleaved: bool = False
    """Keep the colours of a pixel side by side in memory: less work here, more where a CPU colours the images."""

    def read(self, task: Task) -> RawBatch:
        """Return the images of `task`.

        Raises:
            DataError: an image and all that could replace it are unreadable.
        """
        views = {name: self._room(crop, len(task.ids)) for name, crop in task.crops.items()}
        failures: list[Failure] = []
        kept: list[int] = []
        labels: list[int] = []
        for group in _groups(self._reads(task.ids, failures)):
            first = len(kept)
            kept += [wanted for wanted, _ in group]
            labels += [read.label for _, read in group]
            self._cut(task, group, {name: view[:, first : len(kept)] for name, view in views.items()})
        views = {name: view[:, : len(kept)] for name, view in views.items()}
        return RawBatch(views, _int64(labels), _int64(kept), tuple(failures))

    def _room(self, crop: Crop, count: int) -> Tensor:
        """Return memory for the cuts: uint8 [copies, count, C, S, S], not filled."""
        if self.interleaved:
            return torch.empty(crop.count, count, crop.size, crop.size, 3, dtype=torch.uint8).movedim(-1, 2)
        return torch.empty(crop.count, count, 3, crop.size, crop.size, dtype=torch.uint8)

    def _reads(self, ids: Tensor, failures: list[Failure]) -> Iterator[tuple[int, Read]]:
        """Yield each id that is kept, with its image; unreadable images are added to `failures`."""
        for wanted in ids.tolist():
            if self.unreadable == "replace":
                read = read_or_replace(self.source, wanted, self.seed)
                failures += read.failures
                yield wanted, read
                continue
            try:
                yield wanted, Read(wanted, self.source.read(wanted), int(self.source.labels[wanted]))
            except UnreadableImage as error:
                failures.append(Failure(wanted, self.source.location(wanted), str(error)))

    def _cut(self, task: Task, group: list[tuple[int, Read]], views: Mapping[str, Tensor]) -> None:
        """Fill `views`, uint8 [count, b, C, S, S], from the b images of the group."""
        ids = _int64([wanted for wanted, _ in group])
        heights = _int64([read.image.shape[1] for _, read in group])
        widths = _int64([read.image.shape[2] for _, read in group])
        for name, crop in task.crops.items():
            for copy, view in enumerate(views[name]):
                boxes = boxes_for(
                    crop, heights, widths, seed=self.seed, epoch=task.epoch, ids=ids, view=name, copy=copy
                )
                for shown, (_, read), box in zip(view, group, boxes.one_by_one(), strict=True):
                    shown.copy_(cut(read.image, box, crop, interleaved=self.interleaved))


@dataclass(frozen=True, slots=True)
class Crew:
    """The processes that read, and how far ahead."""

    workers: int = 0
    """0 reads in a thread of this process, nothing ahead."""
    prefetch: int = 1
    """Batches that each worker prepares ahead."""
    pin_memory: bool = False
    batch_bytes: int = 0
    """Bytes of the largest batch, for the account of shared memory."""


def read_batches(
    reader: Reader, tasks: Iterable[Task], crew: Crew, stop: StopRequest | None = None
) -> Iterator[RawBatch]:
    """Yield the batches of `tasks` in their order; they are the same for any number of workers.

    Workers leave SIGINT, SIGTERM and SIGUSR1 to this process, and end when it ends for any reason.

    Raises:
        OpsinError: a worker raised it.
        TransientError: a worker raised another exception, or has no shared memory for a batch.
        WorkerEnded: a worker ended by itself.
        StoppedWaiting: a stop was requested while waiting.
    """
    if crew.workers == 0:
        return read_in_threads(reader, tasks, stop=stop)
    batches = _from_workers(reader, tasks, crew, stop)
    _close_at_exit(batches)
    return batches


def _close_at_exit(batches: Generator[RawBatch, None, None]) -> None:
    # Else multiprocessing ends processes with the SIGTERM that workers ignore, and waits.
    # By a weak reference: batches that are not needed any more end with their workers at once.
    reference = weakref.ref(batches)

    def close() -> None:
        still_needed = reference()
        if still_needed is not None:
            still_needed.close()

    atexit.register(close)


@dataclass(frozen=True, slots=True)
class _Fault:
    """The fault of a worker as a value, since the loader would hide an exception in a traceback."""

    kind: type[OpsinError]
    faults: tuple[str, ...]


class _Tasks(Dataset[RawBatch | _Fault]):
    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, task: tuple[Mapping[str, Crop], int, list[int]]) -> RawBatch | _Fault:
        crops, epoch, ids = task
        try:
            batch = self.reader.read(Task(crops, epoch, _int64(ids)))
        except OpsinError as error:
            return _Fault(type(error), error.faults)
        except Exception as error:
            text = f"data.workers: reading failed in a worker with {type(error).__name__}: {error}"
            return _Fault(TransientError, (f"{text}; data.workers=0 shows where",))
        try:
            # Here and not where the loader does it, in a thread that drops the batch if there is no room.
            batch.share_memory()
        except RuntimeError as error:
            return _Fault(TransientError, (describe_no_room(batch.nbytes, error),))
        return batch


def _from_workers(
    reader: Reader, tasks: Iterable[Task], crew: Crew, stop: StopRequest | None
) -> Generator[RawBatch, None, None]:
    # Workers live as long as this end of the pipe is open, and the end of this process closes it too. The loader's
    # own watch looks at the parent of a worker, which is the fork server here and outlives training.
    ended, alive = _context().Pipe(duplex=False)
    with reserved(crew.workers, crew.prefetch, crew.batch_bytes), ended, alive:
        batches = None
        try:
            batches = _start(reader, tasks, crew, ended)
            while (batch := _next(batches, stop)) is not None:
                if isinstance(batch, _Fault):
                    raise batch.kind(*batch.faults)
                # Not held here while it is used: the shared memory of one batch.
                handed = [batch]
                del batch
                yield handed.pop()
        except (StoppedWaiting, KeyboardInterrupt):
            # A worker that hangs in a read ends at once by this, and would not in order.
            alive.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            # The last two: a worker died between announcing a batch and handing over its memory, or the fork server
            # died while it started a worker.
            raise WorkerEnded(_describe_end(error, crew.workers)) from error
        finally:
            # Ends the workers in order. The garbage collector would let the loader wait for its own dead threads.
            del batches


def _next(batches: Iterator[RawBatch | _Fault], stop: StopRequest | None) -> RawBatch | _Fault | None:
    """Return the next batch; None after the last."""
    patience = Patience(stop)
    while True:
        try:
            return next(batches, None)
        except RuntimeError as error:
            if not str(error).startswith(_TIMED_OUT):
                raise
        patience.check()


def _start(reader: Reader, tasks: Iterable[Task], crew: Crew, ended: Connection) -> Iterator[RawBatch | _Fault]:
    with warnings.catch_warnings():
        # More workers than cores is the user's decision.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _Tasks(reader),
            batch_size=None,
            sampler=((task.crops, task.epoch, task.ids.tolist()) for task in tasks),
            num_workers=crew.workers,
            prefetch_factor=crew.prefetch,
            pin_memory=crew.pin_memory,
            collate_fn=_unchanged,
            worker_init_fn=partial(_begin_work, ended),
            multiprocessing_context=_context(),
            generator=torch.Generator(),  # the loader draws a seed for workers: not from the global generator
            timeout=POLL_S,
        )
        return iter(loader)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # Imported once, in the process that workers are forked from.
    context.set_forkserver_preload([__name__])
    return context


def _describe_end(error: Exception, workers: int) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"data.workers={workers}: a worker process ended by itself ({reason}); memory or /dev/shm may be full: try "
        "fewer workers, or try again; a script of your own must start training below `if __name__ == '__main__':`"
    )


def _begin_work(ended: Connection, _: int) -> None:
    """Run first in a worker: the training process decides when to stop, and the worker ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_when, args=(ended,), daemon=True).start()


def _end_when(ended: Connection) -> None:
    ended.poll(None)
    os._exit(0)


def _groups(reads: Iterable[tuple[int, Read]]) -> Iterator[list[tuple[int, Read]]]:
    """Group consecutive reads to about 64 MiB: the photographs of a whole batch may not fit into memory."""
    group: list[tuple[int, Read]] = []
    held = 0
    for wanted, read in reads:
        group.append((wanted, read))
        held += read.image.nbytes
        if held >= _GROUP_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group


def _unchanged(batch: Any) -> Any:
    return batch


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
