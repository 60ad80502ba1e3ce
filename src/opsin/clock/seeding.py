"""Random numbers as functions of their use, never of earlier draws.

A draw is addressed by `(seed, epoch, sample id, stream)`: the same number comes out in any
worker, on any device, in any order, after any resume. Nothing has to be saved.

Shapes: B samples, N samples of a data set.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_MASK_63 = 0x7FFFFFFFFFFFFFFF


def fold_in(seed: int, *values: int | str) -> int:
    """A new seed in [0, 2**63) that depends on every value and on their order."""
    text = ",".join(repr(value) for value in (seed, *values))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & _MASK_63


def uniform(seed: int, epoch: int, ids: Tensor, stream: str, count: int) -> Tensor:
    """`count` numbers in [0, 1) for every sample: float32 [B, count], on the device of `ids`.

    `ids` is int64 [B]. `stream` names the use, so that two uses never share numbers.
    The values have 24 random bits, hence are exact in float32 and equal on every device.
    """
    return uniforms(seed, epoch, ids, {stream: count})[stream]


def uniforms(seed: int, epoch: int, ids: Tensor, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """`uniform` for each stream of `counts`, in as many operations as for one."""
    if not counts:
        return {}
    keys = torch.tensor([fold_in(seed, epoch, stream) for stream in counts], device=ids.device)
    sizes = list(counts.values())
    stream = torch.repeat_interleave(torch.tensor(sizes)).to(ids.device)  # of each column
    column = torch.cat([torch.arange(size) for size in sizes]).to(ids.device)
    mixed = _mix((ids & _MASK_32)[:, None] ^ (keys & _MASK_32))
    mixed = _mix(mixed ^ (keys >> 32) ^ (ids >> 32)[:, None])  # [B, streams]
    mixed = _mix(mixed[:, stream] ^ _mix(column * 0x9E3779B9 & _MASK_32))
    numbers = (mixed >> 8).to(torch.float32) * (1.0 / (1 << 24))
    return dict(zip(counts, numbers.split(sizes, dim=1), strict=True))


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order of an epoch: every id below `size` once, int64 [N], equal on every platform."""
    ids = torch.arange(size, dtype=torch.int64)
    key = fold_in(seed, epoch, "order")
    first = _mix(_mix(ids ^ (key & _MASK_32)) ^ (key >> 32))
    second = _mix(first ^ _mix(ids + 0x85EBCA6B & _MASK_32))
    return torch.argsort((first << 31) ^ second, stable=True)


def seed_layers(seed: int, step: int, rank: int, part: int) -> None:
    """Seed the draws of layers in one forward pass (dropout, drop path) on every device of this process."""
    number = fold_in(seed, "layers", step, rank, part)
    # Not torch.manual_seed: without a GPU it formats a stack trace at each call, for a GPU that may start later.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def _mix(values: Tensor) -> Tensor:
    # A 32-bit finaliser (xor-shift, multiply) in int64: the product of two 32-bit numbers wraps
    # the same way on every device, and the mask keeps the low 32 bits.
    values = values ^ (values >> 16)
    values = (values * 0x21F0AAAD) & _MASK_32
    values = values ^ (values >> 15)
    values = (values * 0x735A2D97) & _MASK_32
    return values ^ (values >> 15)
