"""Several processes on this machine that do one piece of work together, over gloo."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

PROCESSES = 2


def run_together(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work`, a function of a module, gives in each process when called with its rank."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_be_one, args=(work, rank, folder), daemon=True) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    if any(process.exitcode != 0 for process in processes):
        for process in processes:
            process.kill()
        pytest.fail(f"exit codes {[process.exitcode for process in processes]}: see the captured error output")
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def _be_one(work: Callable[[int], Any], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
