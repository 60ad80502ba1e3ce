"""Muon: momentum whose direction is made orthogonal, for the filters and matrices inside a network.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Everything else (first
layer, head, biases, norms) takes Nesterov momentum. An update that `found_inf` cancels changes nothing.

Shapes: n matrices, O outputs of a layer, I inputs times the filter's pixels.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_QUINTIC = 3.4445, -4.7750, 2.0315
_VALUES_AT_ONCE = {"cpu": 1 << 20, "gpu": 1 << 24}
"""Values of the parameters that are updated together: a GPU starts few kernels, a CPU stays in its cache."""


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
        alike: dict[object, tuple[dict[str, Any], list[Tensor]]] = {}
        for group in self.param_groups:
            key = group["hidden"], group["lr"], group["momentum"], group["weight_decay"]
            alike.setdefault(key, (group, []))[1].extend(param for param in group["params"] if param.grad is not None)
        for group, params in alike.values():
            for batch in _batches(params, alike=group["hidden"]):
                applied = torch.ones((), device=batch[0].device) if self.found_inf is None else 1 - self.found_inf
                self._update(batch, group, applied)

    def _update(self, params: list[Tensor], group: dict[str, Any], applied: Tensor) -> None:
        """Update parameters of one group together; hidden ones have one shape."""
        lr, momentum = group["lr"], group["momentum"]
        gradients = _gradients(params, applied)
        velocities = [self.state[param]["momentum_buffer"] for param in params]
        torch._foreach_mul_(velocities, torch.where(applied > 0, momentum, 1.0))
        torch._foreach_add_(velocities, gradients)
        directions = list(torch._foreach_mul(velocities, momentum))
        torch._foreach_add_(directions, gradients)
        if group["hidden"]:
            directions = list(orthogonal(torch.stack(directions), self.newton_schulz_steps).unbind())
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"] * applied)
        torch._foreach_mul_(directions, -lr * applied)
        torch._foreach_add_(params, directions)
        if group["hidden"] and self.unit_filters:
            factors = len(params[0]) ** 0.5 / torch.stack(torch._foreach_norm(params))
            torch._foreach_mul_(params, list(torch.where(applied > 0, factors, 1.0).unbind()))


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with (nearly) orthonormal rows or columns, of the same shape.

    Filters [n, O, ...] count as matrices [n, O, I]. Singular values end between 0.7 and 1.2 after five steps of the
    published quintic Newton-Schulz iteration; with fewer steps the smallest stay smaller. Times sqrt(O / I) if O > I.

    A GPU computes in bf16, as published. Five steps multiply small singular values, and the roundings beside them, by
    485: in bf16 the direction of a gradient of low rank differs between chips by some percent, in the float32 of a CPU
    by less than a thousandth.
    """
    x = matrices.flatten(2)
    rows, columns = x.shape[1:]
    on_cpu = x.device.type == "cpu"
    x = x.to(torch.promote_types(x.dtype, torch.float32) if on_cpu else torch.bfloat16)
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    x = x.mT if rows > columns else x
    x = _iterate_on_grams(x, steps) if on_cpu else _iterate(x, steps)
    x = x.mT if rows > columns else x
    result: Tensor = x.to(matrices.dtype).reshape(matrices.shape) * max(1.0, rows / columns) ** 0.5
    return result


def _iterate(x: Tensor, steps: int) -> Tensor:
    """`steps` times x <- a x + b (x x^T) x + c (x x^T)^2 x, for each matrix."""
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_on_grams(x: Tensor, steps: int) -> Tensor:
    """The same, with the products of an iteration between small square matrices: a third of the work where I = 9 O.

    Every iterate is a polynomial q of the first gram matrix times x: p = a + b gram + c gram^2, then q <- p q and
    gram <- p gram p. These square small singular values, which float32 can bear and bf16 cannot.
    """
    a, b, c = _QUINTIC
    gram = x @ x.mT
    q: Tensor | None = None
    for step in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        q = p if q is None else p @ q
        if step + 1 < steps:
            gram = p @ gram @ p
    return x if q is None else q @ x


def _batches(params: list[Tensor], *, alike: bool) -> Iterator[list[Tensor]]:
    """Parameters that are updated together: where `alike`, all of a batch have one shape."""
    found: dict[object, list[Tensor]] = {}
    for param in params:
        found.setdefault((param.dtype, param.shape if alike else None), []).append(param)
    for members in found.values():
        most = _VALUES_AT_ONCE["cpu" if members[0].device.type == "cpu" else "gpu"]
        batch: list[Tensor] = []
        for param in members:
            if batch and sum(map(Tensor.numel, batch)) + param.numel() > most:
                yield batch
                batch = []
            batch.append(param)
        yield batch


def _gradients(params: list[Tensor], applied: Tensor) -> list[Tensor]:
    """The gradients, or zeros if `applied` is 0: those of a cancelled update may not be finite."""
    flat = torch.cat([param.grad.flatten() for param in params if param.grad is not None])
    parts = torch.where(applied > 0, flat, 0.0).split([param.numel() for param in params])
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]
