"""From the host to a device, without a wait of the host.

A copy from ordinary memory makes the host wait until the device has finished all earlier work; one from page-locked
memory is queued.
"""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the host to a GPU it goes through page-locked memory."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    locked = tensor if tensor.is_pinned() else tensor.pin_memory()
    return locked.to(device, non_blocking=True)


class Courier:
    """Sends the pixels of batches; a GPU copies them beside its other work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._beside = torch.Stream(device) if device.type == "cuda" else None

    def send(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device; what is queued from now on finds it there."""
        if self._beside is None or tensor.device.type != "cpu":
            return send(tensor, self._device)
        with self._beside:
            sent = send(tensor, self._device)
        queue = torch.accelerator.current_stream(self._device)
        queue.wait_stream(self._beside)
        sent.record_stream(queue)  # its memory is free only when this queue has used it
        return sent
