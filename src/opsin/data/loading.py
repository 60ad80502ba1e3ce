"""Loading: from stored images to batches on the device.

`Order` chooses the images, `Reader` (in this process or in workers) or `Resident` cuts them, and `_Finish` colours and
normalises them on the device. Batch k is the same on each of these paths.

Shapes: B images of a batch, C channels, S side of a crop in pixels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opsin.clock import seeding
from opsin.data.base import Augment, Batch, Blend, DataFacts, Detour, Source, Views
from opsin.data.order import Order, share
from opsin.data.quarantine import Failure, Quarantine
from opsin.data.resident import Residence, Resident, byte_limit, read_everything
from opsin.data.shared_memory import available_bytes, describe_fitted, fit
from opsin.data.transfer import Courier, send
from opsin.data.views.colour import Normalize, num_cached
from opsin.data.views.crops import CenterCrop, Crop
from opsin.data.views.mix import Mix
from opsin.data.waiting import StopRequest
from opsin.data.workers import Crew, RawBatch, Reader, Task, read_batches
from opsin.errors import DataError
from opsin.processes.trail import Trail
from opsin.storage.teller import Silence, Teller

_PAGE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingPlan:
    """The path of images to a device. Training and evaluation follow it alike."""

    source: Source
    facts: DataFacts
    device: torch.device
    workers: int = 0
    """Processes that read; 0 reads in this process."""
    prefetch: int = 4
    """Batches that each worker prepares ahead."""
    resident: Residence = "auto"
    channels_last: bool = False
    rank: int = 0
    world: int = 1
    """Processes that share the images of every batch; this one is number `rank`."""
    teller: Teller = field(default_factory=Silence)
    stop: StopRequest | None = None
    """Ends a wait for images."""
    reported: set[int] = field(default_factory=set)
    """Sizes of batches for which `teller` has had a notice, from this plan or from one that was made from it."""

    def share(self, count: int) -> slice:
        """The part of `count` images that this process computes."""
        return share(count, rank=self.rank, world=self.world)

    def read(self, reader: Reader, tasks: Iterable[Task], *, batch_bytes: int) -> Iterator[RawBatch]:
        """The batches of `tasks`, of at most `batch_bytes`, not kept in memory."""
        fitted = fit(self.workers, self.prefetch, batch_bytes, available_bytes())
        if fitted.reason is not None and batch_bytes not in self.reported:
            self.reported.add(batch_bytes)
            asked = (self.workers, self.prefetch)
            self.teller.notice(describe_fitted(fitted, asked=asked, batch_bytes=batch_bytes))
        pin = self.device.type == "cuda"
        return read_batches(reader, tasks, Crew(fitted.workers, fitted.prefetch, pin, batch_bytes), self.stop)

    def finish(self, seed: int) -> "_Finish":
        """The last part of the path: from stored pixels to a batch for the network."""
        return _Finish(self.facts, seed=seed, device=self.device, channels_last=self.channels_last)


class TrainingData:
    """The batches of a run, addressed by step; implements `Data`. `views` has one entry for each stage.

    The images and masks of a whole batch do not depend on the number of processes; each process takes the partners of
    mixed images from its own share.
    """

    def __init__(
        self,
        plan: LoadingPlan,
        views: Sequence[Views],
        order: Order,
        quarantine: Quarantine,
        trail: Trail | None = None,
    ) -> None:
        self.facts = plan.facts
        self._plan = plan
        self._views = views
        self._order = order
        self._quarantine = quarantine
        self._trail = trail or Trail()
        self._residence = plan.resident
        self._finish = plan.finish(order.seed)
        self._resident: Resident | None = None

    def batches(self, start: int, stop: int, detours: Sequence[Detour] = ()) -> Iterator[Batch]:
        """Yield the batches of updates `start` to `stop - 1`; a resumed run begins with a later `start`.

        Raises:
            DataError: too many images are unreadable.
            ConfigError: `resident` is true and the images have several sizes.
            TransientError: a worker process ended by itself, or failed for a reason that is not an image.
        """
        self._trail.at_step(start)
        tasks = (self._task(step, detours) for step in range(start, stop))
        reading = self._read(tasks)
        for step in range(start, stop):
            raw = next(reading)
            for failure in raw.failures:
                self._quarantine.add(*failure)
            position, ids = self._order.ids(step, detours)
            self._trail.at_step(step, ids.numpy().tobytes())
            views, clock = self._views[position.stage], self._order.timeline.clock(step)
            masks = self._masks(views, position.epoch, ids)
            mixes = clock.stage.mix and clock.epoch < views.mix_until * clock.total_epochs
            batch = self._finish(raw, position.epoch, views, masks, mix=views.mix if mixes else None)
            del raw  # its shared memory
            yield batch
            del batch  # its memory, for the next one
            self._trail.at_step(step + 1)

    def _task(self, step: int, detours: Sequence[Detour]) -> Task:
        position, ids = self._order.ids(step, detours)
        return Task(self._views[position.stage].crops, position.epoch, ids[self._plan.share(len(ids))])

    @property
    def batch_bytes(self) -> int:
        """Bytes of the largest batch of this process, as it is stored."""
        sizes = (len(range(10**9)[self._plan.share(stage.batch_size)]) for stage in self._order.timeline.stages)
        return max(stored_bytes(views.crops, size) for views, size in zip(self._views, sizes, strict=True))

    def load(self) -> None:
        """Decode resident images now instead of with the first batch.

        Raises:
            DataError: too many images are unreadable.
            ConfigError: `resident` is true and the images have several sizes.
        """
        if self._resident is None and self._residence is not False:
            self._resident = Resident.load(
                self._plan.source,
                seed=self._order.seed,
                device=self._plan.device,
                quarantine=self._quarantine,
                residence=self._residence,
                stop=self._plan.stop,
            )
            if self._resident is None:
                self._residence = False  # found too large or of several sizes: not tried again

    def _read(self, tasks: Iterator[Task]) -> Iterator[RawBatch]:
        self.load()
        if self._resident is not None:
            return map(self._resident.read, tasks)
        interleaved = self._plan.device.type != "cpu"
        reader = Reader(self._plan.source, self._order.seed, interleaved=interleaved)
        return self._plan.read(reader, tasks, batch_bytes=self.batch_bytes)

    def _masks(self, views: Views, epoch: int, ids: Tensor) -> dict[str, Tensor]:
        if views.masks is None:
            return {}
        masks, own = views.masks(self._order.seed, epoch, ids), self._plan.share(len(ids))
        return {name: send(mask[own], self._plan.device) for name, mask in masks.items()}


class EvaluationData:
    """The view `image` for evaluation: the centre of each image, once, in the order of the source, not augmented.

    The shorter side is scaled to `resize` and the central square of the training image size is cut out.
    Unreadable images are left out, with one warning. Small sets stay decoded between evaluations.
    """

    def __init__(self, plan: LoadingPlan, *, resize: int) -> None:
        self.facts = plan.facts
        self._plan = plan
        self._views = Views({"image": CenterCrop(size=plan.facts.image_size, resize=resize, flip="none")})
        self._reader = Reader(plan.source, 0, unreadable="leave out", interleaved=plan.device.type != "cpu")
        self._teller: Teller | None = plan.teller
        self._finish = plan.finish(seed=0)
        self._kept: RawBatch | None = None

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches of up to `batch_size` images.

        Raises:
            DataError: no image can be read.
            TransientError: a worker process ended by itself, or failed for a reason that is not an image.
        """
        failures: list[Failure] = []
        images = 0
        for raw in self._raw(batch_size):
            failures += raw.failures
            images += len(raw.ids)
            if len(raw.ids):
                yield self._finish(raw, 0, self._views, {})
        if images == 0 and failures:
            raise DataError(f"{self._describe(failures)}; none is left to evaluate on: check data.path")
        if failures and self._teller is not None:
            self._teller.warning(f"{self._describe(failures)}; they are left out of the scores")
            self._teller = None

    def _raw(self, batch_size: int) -> Iterator[RawBatch]:
        plan = self._plan
        ids = torch.arange(len(plan.source))
        ids = ids[plan.share(len(ids))]
        cut_bytes = len(ids) * plan.facts.channels * plan.facts.image_size**2
        if plan.resident is True or (plan.resident == "auto" and cut_bytes <= byte_limit(plan.device)):
            if self._kept is None:
                self._kept = read_everything(self._reader, Task(self._views.crops, 0, ids), plan.device, plan.stop)
            return self._kept.pieces(batch_size)
        tasks = (Task(self._views.crops, 0, part) for part in torch.split(ids, batch_size))
        return plan.read(self._reader, tasks, batch_bytes=stored_bytes(self._views.crops, batch_size))

    def _describe(self, failures: Sequence[Failure]) -> str:
        listed = ", ".join(f"{failure.location} ({failure.reason})" for failure in failures[:3])
        more = ", ..." if len(failures) > 3 else ""
        return f"{len(failures)} of {len(self._plan.source)} evaluation images are unreadable: {listed}{more}"


def stored_bytes(crops: Mapping[str, Crop], images: int) -> int:
    """Bytes of a batch of `images` before it is coloured, with its labels and ids, in whole pages of memory."""
    views = (crop.count * images * 3 * crop.size**2 for crop in crops.values())
    return sum(-(-count // _PAGE) * _PAGE for count in (*views, 8 * images, 8 * images))


class _Finish:
    """Move a raw batch to the device, and colour, normalise and mix it there."""

    def __init__(self, facts: DataFacts, *, seed: int, device: torch.device, channels_last: bool) -> None:
        self._seed = seed
        self._device = device
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._normalize = Normalize(facts.mean, facts.std, device=device)
        self._courier = Courier(device)

    def __call__(
        self, raw: RawBatch, epoch: int, wanted: Views, masks: Mapping[str, Tensor], *, mix: Mix | None = None
    ) -> Batch:
        drawn = self._draw(raw, epoch, wanted, mix)
        ids, labels = send(raw.ids, self._device), send(raw.labels, self._device)
        views = {name: self._view(name, view, wanted.augment.get(name, ()), drawn) for name, view in raw.views.items()}
        blend: Blend | None = None
        if mix is not None:
            ((name, view),) = views.items()
            (images,) = view
            mixed = mix(images, drawn["mix"])
            views = {name: self._in_format(mixed.images[None])}
            blend = Blend(labels[mixed.partners], mixed.shares)
        return Batch(views, labels, ids, masks, blend)

    def _draw(self, raw: RawBatch, epoch: int, wanted: Views, mix: Mix | None) -> dict[str, Tensor]:
        """All random numbers of a batch by stream, on the CPU."""
        counts = {
            f"{name}.{copy}.{index}": op.num_draws
            for name, view in raw.views.items()
            for copy in range(len(view))
            for index, op in enumerate(wanted.augment.get(name, ()))
        }
        if mix is not None:
            counts["mix"] = mix.num_draws
        return seeding.uniforms(self._seed, epoch, raw.ids, counts)

    def _view(self, name: str, view: Tensor, ops: Sequence[Augment], drawn: Mapping[str, Tensor]) -> Tensor:
        """Convert stored pixels, uint8 [count, B, C, S, S], to floats of the same shape."""
        view = self._courier.send(view)
        if not ops:
            return self._in_format(self._normalize.bytes(view))
        finished = self._in_format(torch.empty(view.shape, device=self._device))
        images, out = view.flatten(0, 1), finished.flatten(0, 1)
        draws = [torch.cat([drawn[f"{name}.{copy}.{index}"] for copy in range(len(view))]) for index in range(len(ops))]
        at_once = num_cached(images)
        for first in range(0, len(images), at_once):
            part = slice(first, first + at_once)
            coloured = images[part].to(torch.float32, memory_format=torch.contiguous_format).div_(255)
            for op, numbers in zip(ops, draws, strict=True):
                coloured = op(coloured, numbers[part])
            self._normalize(coloured, out=out[part])
        return finished

    def _in_format(self, view: Tensor) -> Tensor:
        return view.flatten(0, 1).contiguous(memory_format=self._memory_format).view(view.shape)
