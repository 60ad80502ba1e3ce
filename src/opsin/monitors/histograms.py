"""Sizes of the gradients in each part of a network, which a single norm hides.

Shapes: P parts, Q quantiles, n gradients of a part that are looked at.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from opsin.clock.cadence import StepEvery, is_due
from opsin.clock.timeline import Timeline
from opsin.methods.base import Method
from opsin.reporting.journal import GRADIENTS, PERCENTS, quantile_names
from opsin.training.monitor import Monitor, MonitorConfig
from opsin.training.state import StepReport, TrainState

_MOST = 2**18
"""Gradients of a part that are sorted; of more, evenly spaced ones."""


class HistogramsConfig(MonitorConfig):
    """Sizes of the gradients in each part of the network, as the optimizer gets them; judges nothing."""

    name: Literal["histograms"] = "histograms"
    every: StepEvery = "1 epoch"
    """Interval between measurements."""
    by: Literal["depth", "module"] = "depth"
    """The parts: `depth` takes each layer of the trained network and the modules around it, `module` the modules of the
    method."""

    def build(self, timeline: Timeline) -> "Histograms":
        return Histograms(self, timeline)


class Histograms(Monitor):
    """Measures quantiles of the absolute gradients of an update, just before it is made."""

    def __init__(self, config: HistogramsConfig, timeline: Timeline) -> None:
        self._config = config
        self._timeline = timeline
        self._seen: Mapping[str, Tensor] = {}
        """Quantiles [Q] of each part, on the device, of the update that is due."""

    @torch.no_grad()
    def view_gradients(self, method: Method, step: int) -> None:
        """Keep the quantiles of update `step` if it is measured, without waiting for the device."""
        if is_due(self._config.every, self._timeline, step):
            parts = parts_by_depth(method) if self._config.by == "depth" else parts_by_module(method)
            self._seen = {part: quantiles(grads) for part, grads in parts.items()}

    def measure(self, state: TrainState, report: StepReport) -> Mapping[str, float]:
        """`gradients/<part>_q05` to `_q100`, except for a part in which some are not finite."""
        seen, self._seen = self._seen, {}
        if not seen:
            return {}
        table = torch.stack(list(seen.values())).tolist()  # [P, Q]
        return {
            name: value
            for part, row in zip(seen, table, strict=True)
            if all(map(math.isfinite, row))
            for name, value in zip(quantile_names(GRADIENTS, part), row, strict=True)
        }


def parts_by_depth(method: Method) -> dict[str, list[Tensor]]:
    """Gradients by layer of the trained network (`layer_00`), the others by module."""
    layers, params = method.trained_backbone.layers(), method.trained_backbone.named_parameters()
    of_layers = {id(param): f"layer_{layers[name]:02}" for name, param in params}
    return _grouped(method, of_layers)


def parts_by_module(method: Method) -> dict[str, list[Tensor]]:
    """Gradients by module of the method."""
    return _grouped(method, {})


def quantiles(grads: Sequence[Tensor]) -> Tensor:
    """Percentiles of all absolute values together: float32 [Q], on their device.

    NaN counts as larger than all numbers.
    """
    stride = -(-sum(grad.numel() for grad in grads) // _MOST)
    values = torch.cat([grad.flatten()[::stride] for grad in grads]).float().abs().sort()[0]  # [n]
    return torch.stack([values[max(-(-len(values) * percent // 100) - 1, 0)] for percent in PERCENTS])


def _grouped(method: Method, part_of: Mapping[int, str]) -> dict[str, list[Tensor]]:
    """The gradients by part, sorted by name; the part of a parameter is that of its `id`, or its module."""
    parts: dict[str, list[Tensor]] = {}
    for name, param in method.named_parameters():
        if param.grad is not None:
            parts.setdefault(part_of.get(id(param), name.partition(".")[0]), []).append(param.grad)
    return dict(sorted(parts.items()))
