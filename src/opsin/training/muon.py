"""Muon: momentum whose direction is made orthogonal, for the filters and matrices inside a network.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Everything else (first
layer, head, biases, norms) takes Nesterov momentum. An update that `found_inf` cancels changes nothing.

Shapes: O outputs of a layer, I inputs times the filter's pixels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Muon(Optimizer):
    """Updates along orthogonal directions for groups marked `hidden`, along the velocity for others.

    With `unit_filters`, hidden weights are scaled to norm sqrt(O) after each update: norm layers after them make their
    length irrelevant, and the learning rate then has the same effect at every step.
    """

    found_inf: Tensor | None = None
    """Set by the caller before `step`: 1 on the device cancels the update, while the host does not wait."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        unit_filters: bool,
        newton_schulz_steps: int = 5,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "hidden": False, "weight_decay": 0.0})
        self.unit_filters = unit_filters
        self.newton_schulz_steps = newton_schulz_steps
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure would be a second forward
        """Update the parameters that have gradients."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            applied = torch.ones((), device=params[0].device) if self.found_inf is None else 1 - self.found_inf
            for param in params:
                direction = self._direction(param, group, applied)
                param.mul_(1 - group["lr"] * group["weight_decay"] * applied)
                param.add_(direction * (-group["lr"] * applied))
                if group["hidden"] and self.unit_filters:
                    length = len(param) ** 0.5 / param.norm()
                    param.mul_(torch.where(applied > 0, length, torch.ones_like(length)))

    def _direction(self, param: Tensor, group: dict[str, Any], applied: Tensor) -> Tensor:
        assert param.grad is not None
        gradient = torch.where(applied > 0, param.grad, torch.zeros_like(param.grad))
        velocity: Tensor = self.state[param]["momentum_buffer"]
        velocity.mul_(torch.where(applied > 0, group["momentum"], 1.0)).add_(gradient)
        ahead = gradient + group["momentum"] * velocity
        return orthogonal(ahead, self.newton_schulz_steps) if group["hidden"] else ahead


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with (nearly) orthonormal rows or columns, of the same shape.

    A filter [O, ...] counts as a matrix [O, I]. Singular values end between 0.7 and 1.2 after five
    steps of a quintic Newton-Schulz iteration, in bf16 as published; with fewer steps the smallest
    stay smaller. Times sqrt(O / I) where O > I.
    """
    rows, columns = len(matrix), matrix[0].numel()
    x = matrix.reshape(rows, columns).bfloat16()
    x = x / (x.norm() + 1e-7)
    x = x.T if rows > columns else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if rows > columns else x
    result: Tensor = x.to(matrix.dtype).reshape(matrix.shape) * max(1.0, rows / columns) ** 0.5
    return result
