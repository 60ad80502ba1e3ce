"""Numerics: the device, the number format, the attention kernel and the memory layout of a recipe on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from opsin.errors import ConfigError, TrainingError, is_out_of_memory
from opsin.methods.base import Method
from opsin.nn.attention import choose_attention, set_attention
from opsin.run.recipe import Recipe
from opsin.storage.teller import Teller
from opsin.training import precision

_ANY_ORDER = " does not have a deterministic implementation"  # in the message of torch


@dataclass(frozen=True, slots=True)
class Numerics:
    """The choices with which this machine computes a recipe."""

    device: torch.device
    precision: str
    attention: str
    channels_last: bool


def choose_numbers(recipe: Recipe, teller: Teller) -> tuple[torch.device, str]:
    """The device and the number format, with torch's switches set for them.

    Raises:
        ConfigError: the machine lacks what the recipe asks for.
    """
    device = precision.choose_device(recipe.device)
    choice = precision.choose_precision(recipe.precision, device)
    teller.notice(f"device: {device} ({precision.describe_device(device)})")
    teller.notice(f"precision: {choice.value} ({choice.reason})")
    for line in precision.configure(device, choice.value, deterministic=recipe.deterministic):
        teller.notice(line)
    return device, choice.value


def settle_numerics(
    recipe: Recipe, method: Method, device: torch.device, number_format: str, teller: Teller
) -> Numerics:
    """The choices for this network on this device, instead of each `auto`."""
    kind, reason = choose_attention(device, number_format)
    if recipe.attention != "auto":
        kind, reason = recipe.attention, "asked for"
    if set_attention(method, kind):
        teller.notice(f"attention: {kind} ({reason})")
    channels_last = recipe.channels_last
    if channels_last == "auto":
        # A vision transformer has one convolution, its patch embedding.
        channels_last = sum(isinstance(module, nn.Conv2d) for module in method.modules()) > 1
    return Numerics(device, number_format, kind, channels_last)


def move(method: Method, numerics: Numerics) -> Method:
    """The method on its device, in its memory format."""
    if numerics.channels_last:
        method = method.to(memory_format=torch.channels_last)
    return method.to(numerics.device)


@contextmanager
def explain_torch_errors(recipe: Recipe) -> Iterator[None]:
    """Turn errors of torch that a change of the recipe avoids into ours: memory, compiler, deterministic kernels."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            sizes = [stage.batch_size or recipe.batch_size for stage in recipe.stages] or [recipe.batch_size]
            raise TrainingError(
                f"out of memory at batches of up to {max(sizes)} images and accumulate={recipe.accumulate}: raise "
                "accumulate, or lower batch_size, the image size (of the stages too) or the size of the model; updates "
                "are split where memory.on_out_of_memory allows it (with batch norm it must say `always`), in pieces "
                "of one image at the least"
            ) from error
        if _ANY_ORDER in str(error):
            operation = str(error).partition(_ANY_ORDER)[0].strip()
            raise ConfigError(
                f"deterministic: true: torch has no {operation} that gives the same bits each time on this device; use "
                "deterministic=false, with which a repeated or resumed run is equal within rounding only, or another "
                "network"
            ) from error
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            reason = str(error).splitlines()[0]
            raise ConfigError(f"compile: true does not work here: {reason}; use compile=false") from error
        raise
