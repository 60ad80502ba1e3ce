"""The processes of a run. One process is a world of size one."""

import os
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from opsin.errors import ConfigError


@dataclass(frozen=True, slots=True)
class World:
    """The number of this process, and how many there are."""

    rank: int = 0
    size: int = 1


def join() -> World:
    """Return the world that the launcher has started.

    Raises:
        ConfigError: several processes were launched, which this version cannot train with.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise ConfigError(f"WORLD_SIZE={size}: this version trains in one process; start it without torchrun")
    return World()


def least_over_processes(tensor: Tensor) -> Tensor:
    """The least value of all processes; `tensor` itself in a single one."""
    if dist.is_available() and dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor


def add_over_processes(*tensors: Tensor) -> None:
    """Replace each tensor by the sum of those of all processes; nothing to do in a single one."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
