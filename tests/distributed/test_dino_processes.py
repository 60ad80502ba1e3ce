"""Two processes with half a batch each train DINO as one process does with all of it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from opsin.methods.dino import Dino
from opsin.training.step import train_step
from tests.distributed.two_processes import PROCESSES, run_together
from tests.unit.methods.dino_parts import batch_of, build_dino, plan_for, state_of

pytestmark = pytest.mark.distributed

STEPS = 3  # over the end of the rest of the prototypes
PIECES: dict[str, dict[str, Any]] = {
    "whole": {},
    "in parts": {"accumulate": 3},
    "in parts by view": {"accumulate": 3, "view_chunk": 1},
}


def train(method: Dino, forward: torch.nn.Module, rank: int, processes: int, pieces: dict[str, Any]) -> None:
    """Some steps, then one whose last image, in the last process, is not a number: it must change nothing."""
    state, plan = state_of(method), plan_for(method, forward=forward, rank=rank, **pieces)
    for step in range(STEPS):
        part = batch_of(step).pieces(processes)[rank]
        assert train_step(state, part, plan).applied == 1
    bad = batch_of(STEPS)
    bad.views["local"][0, -1, 0, 0, 0] = math.nan
    assert train_step(state, bad.pieces(processes)[rank], plan).applied == 0


def work(rank: int) -> dict[str, dict[str, Tensor]]:
    """One of the processes: what each way of training gives."""
    results = {}
    for name, pieces in PIECES.items():
        method = build_dino(learn_scale=True)
        # Prototypes get no gradient while they rest. Buffers are the method's affair: it adds the scores of all
        # processes itself, and those of the first must not replace the others' between two parts of a batch.
        forward = DistributedDataParallel(method, find_unused_parameters=True, broadcast_buffers=False)
        train(method, forward, rank, PROCESSES, pieces)
        results[name] = method.state_dict()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    return run_together(work, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    method = build_dino(learn_scale=True)
    train(method, method, 0, 1, {})
    return method.state_dict()


@pytest.mark.parametrize("name", PIECES)
def test_two_processes_train_as_one(
    name: str, results: list[dict[str, dict[str, Tensor]]], alone: dict[str, Tensor]
) -> None:
    for result in results:
        assert result[name].keys() == alone.keys()
        far = {
            key: ((result[name][key] - value).abs().max() / value.abs().max()).item() for key, value in alone.items()
        }
        # Float64, save that the gradient of resized position embeddings is a float32 number.
        assert all(share < (1e-8 if "pos_embed" in key else 1e-9) for key, share in far.items()), far


@pytest.mark.parametrize("name", PIECES)
def test_processes_stay_alike_to_the_bit(name: str, results: list[dict[str, dict[str, Tensor]]]) -> None:
    one, other = (result[name] for result in results)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_training_changed_every_tensor(alone: dict[str, Tensor]) -> None:
    start = build_dino(learn_scale=True).state_dict()
    assert not any(torch.equal(value, start[key]) for key, value in alone.items())
