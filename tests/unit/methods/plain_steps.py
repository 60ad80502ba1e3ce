"""The few steps that teachers and students of every method are compared over, and how."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opsin.clock.timeline import Stage, Timeline
from opsin.training.state import TrainState

BATCH, EPOCHS, STEPS_PER_EPOCH = 6, 3, 2
TIMELINE = Timeline([Stage(epochs=EPOCHS, batch_size=BATCH, steps_per_epoch=STEPS_PER_EPOCH)])


def plain_rates() -> list[float]:
    """The learning rate of each step: up from a quarter during the first epoch, then half a cosine to a hundredth."""
    peak = 4e-3 * BATCH / (2 * BATCH)
    rise = [peak * (0.25 + 0.75 * step / STEPS_PER_EPOCH) for step in range(STEPS_PER_EPOCH)]
    rest = (EPOCHS - 1) * STEPS_PER_EPOCH
    return rise + [peak * (0.01 + 0.99 * (1 + math.cos(math.pi * step / rest)) / 2) for step in range(rest)]


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def everything(state: TrainState) -> list[Tensor]:
    """Copies of all that an update may change: weights, those of the teacher, buffers and moments."""
    tensors = [*state.method.parameters(), *state.method.buffers()]
    for moments in state.optimizer.state.values():
        tensors += moments.values()
    return [tensor.detach().clone() for tensor in tensors]


def same_bits(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
