"""Two processes with half a batch each train the JEPAs as one process does with all of it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from opsin.methods.ijepa import IJepa
from opsin.training.step import train_step
from tests.distributed.two_processes import PROCESSES, run_together
from tests.unit.methods.jepa_parts import batch_of, build_hjepa, build_ijepa, plan_for, state_of

pytestmark = pytest.mark.distributed

STEPS = 3
METHODS: dict[str, Callable[[], IJepa]] = {"ijepa": build_ijepa, "hjepa": build_hjepa}
PARTS = (1, 3)


def train(method: IJepa, forward: torch.nn.Module, rank: int, processes: int, parts: int) -> None:
    """Some steps, then one whose last image, in the last process, is not a number: it must change nothing."""
    state, plan = state_of(method), plan_for(method, forward=forward, rank=rank, accumulate=parts)
    for step in range(STEPS):
        part = batch_of(method, step).pieces(processes)[rank]
        assert train_step(state, part, plan).applied == 1
    bad = batch_of(method, STEPS)
    bad.views["image"][0, -1] = math.nan
    assert train_step(state, bad.pieces(processes)[rank], plan).applied == 0


def work(rank: int) -> dict[tuple[str, int], dict[str, Tensor]]:
    """One of the processes: what each way of training gives."""
    results = {}
    for name, build in METHODS.items():
        for parts in PARTS:
            method = build()
            # No unused parameters are looked for: every one that learns has a gradient in each step.
            train(method, DistributedDataParallel(method), rank, PROCESSES, parts)
            results[name, parts] = method.state_dict()
    return results


Results = list[dict[tuple[str, int], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_together(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one(name: str, parts: int, results: Results) -> None:
    method = METHODS[name]()
    start = {key: value.clone() for key, value in method.state_dict().items()}
    train(method, method, 0, 1, 1)
    alone = method.state_dict()
    moved = {key for key, value in alone.items() if not torch.equal(value, start[key])}
    assert moved == {key for key in alone if "pos_embed" not in key}
    for result in results:
        found = result[name, parts]
        assert found.keys() == alone.keys()
        far = {key: ((found[key] - value).abs().max() / value.abs().max()).item() for key, value in alone.items()}
        # float64: the same sums in another order.
        assert max(far.values()) < 1e-9, far


def test_processes_stay_alike_to_the_bit(results: Results) -> None:
    one, other = results
    for key, tensors in one.items():
        assert all(torch.equal(value, other[key][name]) for name, value in tensors.items())
