"""Two processes with half a batch each train the JEPAs as one process does with all of it."""

import math
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from opsin.methods.ijepa import IJepa
from opsin.training.step import train_step
from tests.unit.methods.jepa_parts import batch_of, build_hjepa, build_ijepa, plan_for, state_of

pytestmark = pytest.mark.distributed

STEPS = 3
PROCESSES = 2
METHODS: dict[str, Callable[[], IJepa]] = {"ijepa": build_ijepa, "hjepa": build_hjepa}
PARTS = (1, 3)


def train(method: IJepa, forward: torch.nn.Module, rank: int, processes: int, parts: int) -> None:
    """Some steps, then one whose last image, in the last process, is not a number: it must change nothing."""
    state, plan = state_of(method), plan_for(method, forward=forward, rank=rank, accumulate=parts)
    for step in range(STEPS):
        part = batch_of(method, step).split(processes)[rank]
        assert train_step(state, part, plan).applied == 1
    bad = batch_of(method, STEPS)
    bad.views["image"][0, -1] = math.nan
    assert train_step(state, bad.split(processes)[rank], plan).applied == 0


def work(rank: int, folder: Path) -> None:
    """One of the processes: leaves what each way of training gave in a file of its own."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    results = {}
    for name, build in METHODS.items():
        for parts in PARTS:
            method = build()
            # No unused parameters are looked for: every one that learns has a gradient in each step.
            train(method, DistributedDataParallel(method), rank, PROCESSES, parts)
            results[name, parts] = method.state_dict()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


Results = list[dict[tuple[str, int], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("processes")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=work, args=(rank, folder), daemon=True) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    if any(process.exitcode != 0 for process in processes):
        for process in processes:
            process.kill()
        pytest.fail(f"exit codes {[process.exitcode for process in processes]}: see the captured error output")
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


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
