"""What a batch is, what a method asks of it, and what a data source offers.

Shapes: B images of a batch, C channels, S side of a crop in pixels, N images of a source.
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from opsin.data.views.crops import Crop
from opsin.data.views.mix import Mix
from opsin.errors import TransientError

_NETWORK = "ESTALE ETIMEDOUT ENOTCONN ECONNABORTED ECONNREFUSED ECONNRESET EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH"
_MACHINE = "EAGAIN EINTR EMFILE ENFILE ENOBUFS ENOMEM"
_TRANSIENT = frozenset(getattr(errno, name, -1) for name in f"{_NETWORK} {_MACHINE}".split())


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What a method may know of the data before the first batch."""

    classes: tuple[str, ...]
    samples: int
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unlabelled: int = 0
    """How many of the samples have no label."""


class UnreadableImage(Exception):
    """One image cannot be decoded. `str()` is the reason, without the place."""


def raise_if_transient(location: str, error: OSError) -> None:
    """Return if reading `location` failed because of what is stored there, and not for a reason that may pass.

    Raises:
        TransientError: the network or the machine failed. Replacing the image would change what is learned.
    """
    if error.errno in _TRANSIENT:
        reason = error.strerror or str(error)
        raise TransientError(
            f"{location}: cannot be read: {reason}; the image is not at fault: try again later"
        ) from error


class Source(Protocol):
    """Stored images, addressed by index. Must survive pickling into a worker process."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """The image as uint8 [C, H, W], C = 3, upright.

        Raises:
            UnreadableImage: it cannot be decoded.
            TransientError: as `raise_if_transient`.
        """
        ...

    def location(self, index: int) -> str:
        """Where the image is stored, for messages: a path, or `file.parquet row 17`."""
        ...


class Augment(Protocol):
    """A batched operation on the device, with its own random numbers for every sample."""

    @property
    def num_draws(self) -> int:
        """How many random numbers an image needs."""
        ...

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Float images [B, C, S, S] in 0..1 with draws [B, num_draws] in [0, 1) to the same shape."""
        ...


class MaskSampler(Protocol):
    """Draws the masks of a batch; a pure function of its arguments."""

    def __call__(self, seed: int, epoch: int, ids: Tensor) -> Mapping[str, Tensor]:
        """Index tensors by name, each with leading dimension B; `ids`, int64 [B], are those of the whole batch."""
        ...


@dataclass(frozen=True, slots=True)
class Views:
    """Declared by a method, executed by any loader (worker processes or resident images)."""

    crops: Mapping[str, Crop]
    augment: Mapping[str, Sequence[Augment]] = field(default_factory=dict)
    masks: MaskSampler | None = None
    mix: Mix | None = None
    """Mixes the images of the batch; for methods with one crop per image."""
    mix_until: float = 1.0
    """Share of the run after which nothing is mixed any more."""


@dataclass(frozen=True, slots=True)
class Blend:
    """The second label of mixed images."""

    labels: Tensor
    """int64 [B]"""
    shares: Tensor
    """float32 [B]: how much of the target is the image's own label."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images ready for a forward pass. `labels` and `ids` are int64 [B]; label -1 is unlabelled."""

    views: Mapping[str, Tensor]
    """name -> float [count, B, C, S, S], normalised."""
    labels: Tensor
    ids: Tensor
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    blend: Blend | None = None
    """What was mixed into the images, where something was."""
    targets: object = None
    """What a method has computed for several pieces of these images; only `Method.chunks` sets it."""

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, parts: int) -> list["Batch"]:
        """Up to `parts` consecutive pieces, whose sizes differ by one image at most."""
        bounds = [len(self) * index // parts for index in range(parts + 1)]
        return [self._cut(a, b) for a, b in pairwise(bounds) if b > a]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`, copied without waiting where the memory is pinned."""
        return Batch(
            {name: view.to(device, non_blocking=True) for name, view in self.views.items()},
            self.labels.to(device, non_blocking=True),
            self.ids.to(device, non_blocking=True),
            {name: mask.to(device, non_blocking=True) for name, mask in self.masks.items()},
            self.blend and Blend(self.blend.labels.to(device), self.blend.shares.to(device)),
        )

    def _cut(self, start: int, stop: int) -> "Batch":
        return Batch(
            {name: view[:, start:stop] for name, view in self.views.items()},
            self.labels[start:stop],
            self.ids[start:stop],
            {name: mask[start:stop] for name, mask in self.masks.items()},
            self.blend and Blend(self.blend.labels[start:stop], self.blend.shares[start:stop]),
        )


class Detour(Protocol):
    """The updates `first` to `last - 1` get other images than they had; `attempt` says which."""

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int: ...

    @property
    def attempt(self) -> int: ...


class Data(Protocol):
    """Batches addressed by step."""

    facts: DataFacts

    def batches(self, start: int, stop: int, detours: Sequence[Detour] = ()) -> Iterator[Batch]:
        """The batches of updates `start` to `stop - 1`; resume is a later `start`.

        `detours`, the newest last, are the ways around earlier troubles.
        """
        ...
