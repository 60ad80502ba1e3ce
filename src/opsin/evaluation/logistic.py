"""Multinomial logistic regression, fitted with L-BFGS on all images at once.

Without random numbers, minibatches or a learning rate: the loss is convex, and its minimum depends on the
features and on the penalty alone.
Shapes: N images, n of a chunk, D width, K classes.
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.evaluation.features import Features

_CHUNK = 1 << 24
"""Class scores in memory at a time: 64 MiB of them."""
_STRIDE = 10
"""Iterations between two looks at the clock and at what they gained."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A linear classifier and how it was found."""

    weights: Tensor
    """float32 [D + 1, K]; the last row is the bias."""
    iterations: int
    is_complete: bool
    """False if the clock ended it."""


def fit_logistic(
    data: Features,
    *,
    decay: float,
    start: Tensor | None = None,
    iterations: int = 200,
    tolerance: float = 1e-3,
    until_s: float = math.inf,
) -> Fit:
    """The weights with the smallest mean cross-entropy + decay / 2 * sum of their squares (bias apart).

    That is scikit-learn's `LogisticRegression(C=1 / (N * decay))`. From `start`, or from zero. It ends after
    `iterations`, when ten of them lower the loss by less than `tolerance` of it, or at the time `until_s`.
    """
    shape = data.values.shape[1] + 1, data.num_classes
    weights = torch.zeros(shape, device=data.values.device) if start is None else start.clone()
    solver = torch.optim.LBFGS([weights], max_iter=_STRIDE, history_size=10, line_search_fn="strong_wolfe")

    def look() -> float:
        loss, weights.grad = loss_and_gradient(weights, data, decay)
        return loss

    done, before = 0, math.inf
    while done < iterations:
        if time.perf_counter() >= until_s:
            return Fit(weights, done, is_complete=False)
        loss = float(solver.step(look))  # the loss before these iterations
        done += _STRIDE
        # Not `>=`: a loss that is not a number ends it too.
        if not before - loss > tolerance * abs(loss):
            break
        before = loss
    return Fit(weights, done, is_complete=True)


def loss_and_gradient(weights: Tensor, data: Features, decay: float) -> tuple[float, Tensor]:
    """The penalised loss, and its gradient [D + 1, K] written out: nothing is recorded, chunk after chunk."""
    num_classes = data.num_classes
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    gradient = torch.zeros_like(weights)
    rows = max(1, _CHUNK // num_classes)
    for values, labels in zip(data.values.split(rows), data.labels.split(rows), strict=True):
        scores = class_scores(weights, values)  # [n, K]
        total += F.cross_entropy(scores, labels, reduction="sum")
        excess = scores.softmax(1) - F.one_hot(labels, num_classes)  # [n, K]
        gradient[:-1] += values.T @ excess
        gradient[-1] += excess.sum(0)
    gradient /= len(data.labels)
    gradient[:-1] += decay * weights[:-1]
    penalty = decay / 2 * weights[:-1].square().sum()
    return (total / len(data.labels) + penalty).item(), gradient


def class_scores(weights: Tensor, values: Tensor) -> Tensor:
    """[N, D] to [N, K]."""
    return torch.addmm(weights[-1], values, weights[:-1])
