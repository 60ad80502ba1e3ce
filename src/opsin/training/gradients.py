"""Gradients multiplied by factors that were found for them, without a pass over memory that changes nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def scale(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all by one factor, a scalar, or each by its own of [len(grads)]."""
    if factor.device.type == "cpu":
        # Most are within the clip and stay as they are; on a GPU the host would wait for the numbers.
        for grad, own in zip(grads, factor.expand(len(grads)).tolist(), strict=True):
            if own != 1:
                grad.mul_(own)
        return
    torch._foreach_mul_(list(grads), list(factor.unbind()) if factor.ndim else factor)
