"""How this machine computes a recipe: device, number format, attention kernel, memory layout."""

from dataclasses import dataclass

import torch
from torch import nn

from opsin.methods.base import Method
from opsin.nn.attention import choose_attention, set_attention
from opsin.run.recipe import Recipe
from opsin.storage.teller import Teller
from opsin.training import precision


@dataclass(frozen=True, slots=True)
class Numerics:
    """How this machine computes a recipe."""

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
    """What `auto` means for this network on this device."""
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


def place(method: Method, numerics: Numerics) -> Method:
    """The method on its device, in its memory format."""
    if numerics.channels_last:
        method = method.to(memory_format=torch.channels_last)
    return method.to(numerics.device)
