"""Blocks that are computed twice: the same update from less memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opsin.data.base import Batch
from opsin.methods.ijepa import IJepa
from opsin.training.memory import MemoryConfig, save_memory
from tests.unit.methods.jepa_parts import batch_of, build_hjepa, build_ijepa, gradients
from tests.unit.methods.plain_steps import TIMELINE


def kept_bytes(method: IJepa, batch: Batch) -> int:
    """What a forward pass keeps for the backward pass."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method(batch, TIMELINE.clock(0))
    return sum(kept)


@pytest.mark.parametrize("build", [build_ijepa, build_hjepa])
def test_blocks_of_encoder_and_predictors_are_computed_twice_where_asked(build: Callable[..., IJepa]) -> None:
    sizes: dict[tuple[bool, int], int] = {}
    for depth in (2, 5):
        method = build(predictor_depth=depth)
        batch = batch_of(method)
        sizes[False, depth] = kept_bytes(method, batch)
        losses, expected = gradients(method, batch)
        save_memory(MemoryConfig(checkpoint_blocks=True), method)
        sizes[True, depth] = kept_bytes(method, batch)
        again, found = gradients(method, batch)
        assert torch.equal(again.total, losses.total)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    # Three more blocks of each predictor keep what goes into them, and nothing else.
    assert 0 < sizes[True, 5] - sizes[True, 2] < (sizes[False, 5] - sizes[False, 2]) / 10
    assert sizes[True, 5] < sizes[False, 5] / 3
