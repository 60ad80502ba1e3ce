"""A linear classifier on frozen features.

The features are standardised by the bank, and the penalty is chosen on a part of the bank, never on the queries.
Logistic regression is fitted with L-BFGS on all images at once, without random numbers, minibatches or a learning
rate: the loss is convex, and its minimum depends on the features and on the penalty alone.

Shapes: N images, n of a chunk, D width, K classes.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from opsin.clock.cadence import StepEvery
from opsin.evaluation.features import Features, FeatureScore, FeatureScoreConfig, Hits, count_hits, kept_tops
from opsin.training.evaluator import EvaluationContext

_CHOICE_PARTS = 10
"""The penalty is chosen on one of this number of parts of the bank."""
_CHUNK = 16384
_SCORES_CHUNK = 1 << 24
"""Class scores in memory at a time: 64 MiB of them."""
_GAIN = 1e-3
"""Share by which a weaker penalty must lower the loss: the fits are no more exact than that."""
_COPIED_BYTES = 1 << 28
"""The largest bank of which a standardised copy is made; it saves some time in every iteration."""
_STRIDE = 10
"""Iterations between two checks of the clock and of the gain."""


def _check_decays(decays: tuple[float, ...]) -> tuple[float, ...]:
    if not decays or any(decay <= 0 for decay in decays):
        raise ValueError(f"{list(decays)} does not fit; must be one or more numbers above 0")
    return decays


class LinearConfig(FeatureScoreConfig):
    """Accuracy of a linear classifier that is trained on the features, which stay as they are."""

    name: Literal["linear"] = "linear"
    every: StepEvery = "10 epochs"
    """Interval between evaluations. The end of the run is always evaluated."""
    decays: Annotated[tuple[float, ...], AfterValidator(_check_decays)] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    """Weight decays to choose from, by the loss on a tenth of the images that are learned from."""
    iterations: int = Field(200, gt=0)
    """The largest number of iterations of L-BFGS for each weight decay."""

    def build(self, context: EvaluationContext, prefix: str) -> FeatureScore:
        score = partial(score_linear, decays=self.decays, iterations=self.iterations)
        return FeatureScore(self, context, prefix, title="linear probe", score=score)


def score_linear(
    bank: Features,
    queries: Features,
    until_s: float = math.inf,
    *,
    decays: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    iterations: int = 200,
) -> Hits:
    """The number of queries that a linear classifier fitted to the bank classifies rightly.

    The fact `decay` is the penalty that was chosen. The fits end at the time `until_s` of `time.perf_counter`.
    """
    bank, queries = standardise(bank, queries)
    # The last fit is one of len(decays) + 1, and has time of its own.
    share_s = (until_s - time.perf_counter()) / (len(decays) + 1)
    choice = choose_decay(bank, decays, iterations=iterations, until_s=until_s - share_s)
    fit = fit_logistic(bank, decay=choice.decay, start=choice.weights, iterations=iterations, until_s=until_s)
    right = dict(zip(kept_tops(queries.num_classes), count_right(fit.weights, queries).tolist(), strict=True))
    return Hits(right, len(queries.labels), {"decay": choice.decay}, not (choice.is_complete and fit.is_complete))


def standardise(bank: Features, *others: Features) -> list[Features]:
    """All of them with the mean and the standard deviation of each feature of the bank taken out.

    A feature that is constant in the bank, but for rounding, is 0. Large sets are not copied: `Features.chunks` takes
    both out where they are used, with the same bits.
    """
    deviation, mean = torch.std_mean(bank.values, dim=0, correction=0)  # [D]
    lowest = 1e-6 * torch.maximum(mean.abs(), deviation.max())
    factor = torch.where(deviation > lowest, 1 / deviation, 0.0)
    copied = bank.values.nbytes <= _COPIED_BYTES
    return [
        replace(part, values=(part.values - mean) * factor) if copied else replace(part, mean=mean, factor=factor)
        for part in (bank, *others)
    ]


@dataclass(frozen=True, slots=True)
class Choice:
    """A penalty, and the weights that were found with it."""

    decay: float
    weights: Tensor
    """float32 [D + 1, K]"""
    is_complete: bool
    """True if no fit was ended by the clock."""


def choose_decay(bank: Features, decays: Sequence[float], *, iterations: int, until_s: float = math.inf) -> Choice:
    """The penalty with which a fit to the rest of the bank has the smallest loss on its first tenth.

    The loss decides, since accuracies on few images are often equal. From the strongest penalty on, each fit starts
    at the one before, until the loss falls no more than the fits are exact. The bank is in an order whose every
    beginning is stratified.
    """
    held = max(1, len(bank.labels) // _CHOICE_PARTS)
    first, rest = _rows(bank, slice(held)), _rows(bank, slice(held, None))
    if not len(rest.labels):
        rest = first  # a bank of one image
    best: Choice | None = None
    best_loss, weights, is_complete = math.inf, None, True
    for decay in sorted(decays, reverse=True):
        fit = fit_logistic(rest, decay=decay, start=weights, iterations=iterations, until_s=until_s)
        weights, is_complete = fit.weights, fit.is_complete
        ((values, labels),) = first.chunks(held)
        loss = F.cross_entropy(class_scores(weights, values), labels).item()
        if best is not None and not loss < best_loss * (1 - _GAIN):
            break
        best, best_loss = Choice(decay, weights, is_complete), loss
        if not is_complete:
            break
    assert best is not None, "the recipe checks decays"
    return replace(best, is_complete=is_complete)


def count_right(weights: Tensor, data: Features) -> Tensor:
    """`count_hits` of the class scores, chunk after chunk."""
    parts = data.chunks(_CHUNK)
    return torch.stack([count_hits(class_scores(weights, values), labels) for values, labels in parts]).sum(0)


def _rows(data: Features, part: slice) -> Features:
    return replace(data, values=data.values[part], labels=data.labels[part])


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
    rows = max(1, _SCORES_CHUNK // num_classes)
    for values, labels in data.chunks(rows):
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
