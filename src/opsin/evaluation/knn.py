"""Weighted k-nearest-neighbour classification of features.

The classifier of Wu et al. 2018 (section 3.4) as Caron et al. 2021 use it: the k images of the bank with the
largest cosine vote for their class with exp(cosine / T).
Shapes: N images of the bank, Q queries, D width, K classes, k neighbours, b and q of a chunk.
"""

import math
import time
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from opsin.clock.cadence import StepEvery
from opsin.evaluation.features import Features, FeatureScore, FeatureScoreConfig, Hits, count_hits, kept_tops
from opsin.training.evaluator import EvaluationContext

_QUERY_CHUNK, _BANK_CHUNK = 1024, 16384
"""Cosines in memory at a time: 64 MiB of them."""


class KnnConfig(FeatureScoreConfig):
    """Accuracy of a weighted k-nearest-neighbour classifier on the features."""

    name: Literal["knn"] = "knn"
    every: StepEvery = "5 epochs"
    """Interval between evaluations. The end of the run is always evaluated."""
    k: int = Field(20, gt=0)
    """Neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """A vote weighs exp(cosine / temperature)."""

    def build(self, context: EvaluationContext, prefix: str) -> FeatureScore:
        score = partial(score_neighbours, k=self.k, temperature=self.temperature)
        return FeatureScore(self, context, prefix, title=f"k-NN (k {self.k})", score=score)


def score_neighbours(
    bank: Features, queries: Features, until_s: float = math.inf, *, k: int = 20, temperature: float = 0.07
) -> Hits:
    """The number of queries that the votes of their neighbours classify rightly.

    At the time `until_s` of `time.perf_counter` the rest of the queries is left out; the first chunk of them
    is always scored.
    """
    hits, images = [], 0
    for values, labels in zip(queries.values.split(_QUERY_CHUNK), queries.labels.split(_QUERY_CHUNK), strict=True):
        cosines, indices = neighbours(F.normalize(values, dim=1), bank.values, k)
        votes = count_votes(cosines, bank.labels[indices], bank.num_classes, temperature)
        # A class without a vote must not count as the second best either.
        hits.append(count_hits(votes.masked_fill(votes == 0, -math.inf), labels))
        images += len(labels)
        if math.isfinite(until_s):
            hits[-1].sum().item()
            if time.perf_counter() >= until_s:
                break
    right = torch.stack(hits).sum(0).tolist()
    return Hits(dict(zip(kept_tops(bank.num_classes), right, strict=True)), images)


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices, both [Q, k], of the k nearest in the bank, the nearest first; fewer if the bank is smaller.

    Queries [Q, D] are normalised, the bank [N, D] need not be. Of equally near ones the first count, on every device.
    In one line, if [Q, N] were small:

        (queries @ F.normalize(bank).T).sort(dim=1, descending=True, stable=True)
    """
    best = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), _BANK_CHUNK):
        # A normalised copy of the whole bank would be as large as its features.
        cosines = queries @ F.normalize(bank[start : start + _BANK_CHUNK], dim=1).T  # [q, b]
        nearest, found = _largest(cosines, k)
        best = torch.cat([best, nearest], 1)  # the earlier ones first: of equals they stay
        indices = torch.cat([indices, found + start], 1)
        best, kept = _largest(best, k)
        indices = indices.gather(1, kept)
    return best, indices


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, the largest first, and of equals the first column."""
    k = min(k, values.shape[1])
    found = values.topk(min(k + 1, values.shape[1]), dim=1)
    columns = found.indices[:, :k]
    if found.values.shape[1] > k:
        # Which of equals topk takes is another thing on each device; it matters where they stand on both sides of k.
        tied = (found.values[:, k - 1] == found.values[:, k]).nonzero()[:, 0]
        if len(tied):
            rows, least = values[tied], found.values[tied, k - 1 : k]
            above, equal = ~(rows <= least), rows == least
            room = k - above.sum(1, keepdim=True)
            kept = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
            columns = columns.index_copy(0, tied, kept.nonzero()[:, 1].view(-1, k))
    columns = columns.sort(dim=1).values
    best, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)


def count_votes(cosines: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """The sum of exp(cosine / temperature) for each class, over that of the nearest neighbour: [Q, K].

    `cosines` and `labels` are [Q, k], the nearest first.
    """
    # Over the largest: exp(1 / 0.01) is infinite in float32, and a factor for each query changes no order.
    weights = ((cosines - cosines[:, :1]) / temperature).exp()  # [Q, k]
    return weights.new_zeros(len(cosines), num_classes).scatter_add_(1, labels, weights)
