"""An average of the weights over time, kept beside the weights that train.

Polyak and Juditsky 1992; the form with a decay and its warm-up as in Tarvainen and Valpola 2017, section 3.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn

from opsin.settings.family import Settings


class EmaConfig(Settings):
    """A moving average of the weights, scored beside them."""

    decay: float = Field(0.999, gt=0, lt=1)
    """Share of the average that remains at each update."""
    warmup: bool = True
    """Begin with a smaller decay, (1 + step) / (10 + step), to forget the first weights soon."""


class ModelEma:
    """The moving average of every floating-point parameter and buffer of a network, under its own name."""

    def __init__(self, network: nn.Module) -> None:
        tensors = network.state_dict(keep_vars=True)
        self._live = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        self.average = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, decay: float, applied: Tensor) -> None:
        """`average = decay * average + (1 - decay) * weights`; unchanged if the scalar `applied` is 0."""
        follow(list(self.average.values()), list(self._live.values()), applied * (1 - decay))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the network the average as weights inside the context, and its own, bit for bit, after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """The average by name."""
        return dict(self.average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy an average with the same names and shapes."""
        assert state.keys() == self.average.keys(), "the average of another network"
        with torch.no_grad():
            for name, tensor in self.average.items():
                tensor.copy_(state[name])

    def _exchange(self) -> None:
        for name, live in self._live.items():
            live.data, self.average[name] = self.average[name], live.data


@torch.no_grad()
def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], share: Tensor) -> None:
    """Move each average by `share`, a scalar tensor, of its distance to the weight."""
    averages, weights = list(averages), list(weights)
    if share.device.type == "cpu":
        # One pass over memory instead of three; on a GPU the host would wait for the number.
        torch._foreach_lerp_(averages, weights, float(share))
        return
    steps = torch._foreach_sub(weights, averages)
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(averages, steps)


def ema_decay(step: int, *, decay: float, warmup: bool) -> float:
    """The decay of update `step`, counted from 0; with `warmup` it rises from 0.1."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
