"""The interfaces of data: sources of images, the views that a method asks for, and batches.

Shapes: B images of a batch, C channels, S side of a crop in pixels, N images of a source.
"""

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from opsin.data.transfer import send
from opsin.data.views.crops import Crop
from opsin.data.views.mix import Mix
from opsin.errors import TransientError

_NETWORK = "ESTALE ETIMEDOUT ENOTCONN ECONNABORTED ECONNREFUSED ECONNRESET EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH"
_MACHINE = "EAGAIN EINTR EMFILE ENFILE ENOBUFS ENOMEM"
_TRANSIENT = frozenset(getattr(errno, name, -1) for name in f"{_NETWORK} {_MACHINE}".split())


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Facts on the training images that a method may use before the first batch."""

    classes: tuple[str, ...]
    samples: int
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unlabelled: int = 0
    """Number of samples without a label."""


class UnreadableImage(Exception):
    """One image cannot be decoded. `str()` is the reason, without the location."""


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
        """Return the image as uint8 [C, H, W], C = 3, upright.

        Raises:
            UnreadableImage: it cannot be decoded.
            TransientError: as `raise_if_transient`.
        """
        ...

    def location(self, index: int) -> str:
        """The location of the image, for messages: a path, or `file.parquet row 17`."""
        ...


class Augment(Protocol):
    """An operation on a batch on the device; every image has its own random numbers.

    The numbers are on the CPU, where the operation sees which images it changes; `send` brings them to the device.
    """

    @property
    def num_draws(self) -> int:
        """Random numbers that an image needs."""
        ...

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change float images [B, C, S, S] in 0..1 by draws [B, num_draws] in [0, 1); the shape stays.

        `draws` is on the CPU, whatever the device of the images.
        """
        ...


class MaskSampler(Protocol):
    """Draws the masks of a batch: a pure function of its arguments."""

    def __call__(self, seed: int, epoch: int, ids: Tensor) -> Mapping[str, Tensor]:
        """Return index tensors [B, ...] by name; `ids`, int64 [B], are those of the whole batch."""
        ...


@dataclass(frozen=True, slots=True)
class Views:
    """The crops, colours and masks of a batch: declared by a method, made from stored or resident images."""

    crops: Mapping[str, Crop]
    augment: Mapping[str, Sequence[Augment]] = field(default_factory=dict)
    masks: MaskSampler | None = None
    mix: Mix | None = None
    """Mixes the images of a batch; only for methods with one crop of each image."""
    mix_until: float = 1.0
    """Share of the run after which images are no longer mixed."""


@dataclass(frozen=True, slots=True)
class Blend:
    """The second label of mixed images."""

    labels: Tensor
    """int64 [B]"""
    shares: Tensor
    """float32 [B]: share of the image's own label in its target."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images ready for a forward pass. `labels` and `ids` are int64 [B]; label -1 is unlabelled."""

    views: Mapping[str, Tensor]
    """name -> float [count, B, C, S, S], normalised."""
    labels: Tensor
    ids: Tensor
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    blend: Blend | None = None
    """The labels of the images that were mixed in; None if nothing was."""
    targets: object = None
    """Values that a method computes once for several pieces of a batch; only `Method.chunks` sets them."""

    def __len__(self) -> int:
        return len(self.ids)

    def pieces(self, count: int) -> list["Batch"]:
        """Return up to `count` consecutive pieces, whose sizes differ by at most one image."""
        bounds = [len(self) * index // count for index in range(count + 1)]
        return [self._cut(a, b) for a, b in pairwise(bounds) if b > a]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; the host does not wait for the copies."""
        return Batch(
            {name: send(view, device) for name, view in self.views.items()},
            send(self.labels, device),
            send(self.ids, device),
            {name: send(mask, device) for name, mask in self.masks.items()},
            self.blend and Blend(send(self.blend.labels, device), send(self.blend.shares, device)),
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
    """Other images for the updates `first` to `last - 1` than at first; `attempt` numbers the choice."""

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
        """Yield the batches of updates `start` to `stop - 1`; a resumed run begins with a later `start`.

        `detours` replace the images of updates after which training failed; the newest comes last.
        """
        ...
