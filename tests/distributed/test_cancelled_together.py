"""An update that one process cancels is cancelled in all: else their weights would never be the same again."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opsin.clock.schedule import Constant
from opsin.methods.base import Batch, Clock, Losses
from opsin.training.optim import SGD, build_optimizer
from opsin.training.state import TrainState
from opsin.training.step import train_step
from tests.distributed.two_processes import run_together
from tests.unit.training.test_step import Small, batch_of, plan_for

pytestmark = pytest.mark.distributed
CONFIG = SGD(lr=0.1, schedule=Constant())


class Lonely(Small):
    """A method whose second loss is infinite in one process, and its gradients finite."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        losses = super().forward(batch, clock)
        return Losses(losses.total + (math.inf if clock.step == 1 and self.rank == 1 else 0.0))


def work(rank: int) -> dict[str, Any]:
    method = Lonely(rank)
    state, plan = TrainState(method, build_optimizer(CONFIG, method)), plan_for(method, CONFIG)
    applied: list[float] = []
    weights: list[Tensor] = []
    for step in range(3):
        applied.append(train_step(state, batch_of(8, step), plan).applied.item())
        weights.append(method.second.weight.detach().clone())
    return {"applied": applied, "weights": weights}


def test_what_one_process_cancels_no_other_applies(tmp_path_factory: pytest.TempPathFactory) -> None:
    one, other = run_together(work, tmp_path_factory.mktemp("processes"))
    assert one["applied"] == other["applied"] == [1, 0, 1]
    assert torch.equal(one["weights"][0], one["weights"][1])
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))
