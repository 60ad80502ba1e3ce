"""The buffers of a method while an update is made: running statistics that a cancelled update must not change."""

from collections.abc import Sequence

import torch
from torch import Tensor


class KeptBuffers:
    """The values of `buffers` at one moment, in one tensor for each number format: few operations for many buffers."""

    @torch.no_grad()
    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._groups: list[list[Tensor]] = []
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            self._groups.append([buffer for buffer in buffers if buffer.dtype == dtype])
        self._kept = [_joined(group) for group in self._groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore these values."""
        for group, kept in zip(self._groups, self._kept, strict=True):
            _write(group, kept)

    @torch.no_grad()
    def restore_unless(self, applied: Tensor) -> None:
        """Restore these values if the scalar `applied` is 0; the host does not wait for it."""
        for group, kept in zip(self._groups, self._kept, strict=True):
            _write(group, torch.where(applied > 0, _joined(group), kept))


def _joined(group: Sequence[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in group])


def _write(group: Sequence[Tensor], values: Tensor) -> None:
    parts = values.split([buffer.numel() for buffer in group])
    torch._foreach_copy_(list(group), [part.view(buffer.shape) for part, buffer in zip(parts, group, strict=True)])
