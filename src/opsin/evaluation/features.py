"""Scores of features: the common part of such evaluators.

A simple classifier learns from the features of the bank, and the features of the queries are scored. The
network itself learns nothing.

Shapes: B images of a batch, N images of a set, D width, K classes.
"""

import math
import time
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor

from opsin.errors import ConfigError, DataError, is_out_of_memory
from opsin.methods.base import Method
from opsin.nn.backbone import Tokens
from opsin.nn.exact import exact_products
from opsin.training.evaluator import (
    EvaluationContext,
    EvaluatorConfig,
    Labelled,
    LabelledChoice,
    Network,
    StillData,
    untouched,
)
from opsin.training.precision import release_memory

TOPS = (1, 5)
_FEATURES_SHARE = 0.6
"""The largest share of a time budget for features; the rest is for the score."""


class FeatureScoreConfig(EvaluatorConfig, ABC):
    """Settings that every score of features has."""

    path: str | None = None
    """Labelled images of its own, as `data.path`; null takes the training and validation images of the run."""
    holdout: float = Field(0.2, gt=0, lt=1)
    """Share of the images at `path` that are scored, where they have no split of their own."""
    bank_images: int | None = Field(None, gt=0)
    """The largest number of images to learn from, all classes in their proportions; null for all."""
    query_images: int | None = Field(None, gt=0)
    """The largest number of images to score, all classes in their proportions; null for all."""
    blocks: int = Field(1, ge=1)
    """Number of last blocks of a vision transformer whose features are concatenated; DINO and I-JEPA publish 4."""
    seconds: float | None = Field(300.0, gt=0)
    """Seconds for one evaluation, which then uses fewer images and reports their number; null for no limit."""
    batch_size: int = Field(256, gt=0)
    """Images per forward pass; changes speed and memory, not scores."""

    @property
    def choice(self) -> LabelledChoice:
        """The labelled images that these settings ask for."""
        return LabelledChoice(self.path, self.holdout, self.bank_images, self.query_images)

    def check(self, method: Method, prefix: str) -> None:
        # A method with features of its own says nothing of those of single blocks.
        most = method.backbone.num_blocks if type(method).encode is Method.encode else 1
        if not 1 <= self.blocks <= most:
            rule = f"use 1 to {most}" if most > 1 else "use 1, or a method that takes them from model.name=vit"
            raise ConfigError(
                f"evaluators.{prefix}.blocks={self.blocks}: there are features of {most} blocks here; {rule}"
            )


class FeatureNetwork(Network, Protocol):
    """A network with features."""

    def encode(self, images: Tensor) -> Tokens:
        """Features of normalised images [B, C, S, S]."""
        ...


@dataclass(frozen=True, slots=True)
class Features:
    """Features of labelled images, and their labels."""

    values: Tensor
    """float32 [N, D], on the device of the run."""
    labels: Tensor
    """int64 [N], 0 to K - 1, on the same device."""
    num_classes: int
    mean: Tensor | None = None
    """float32 [D], taken out of the values where they are used; None if they stay as they are."""
    factor: Tensor | None = None
    """float32 [D], with which they are then multiplied."""

    def chunks(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Values [n, D] and labels [n] as a score uses them, up to `rows` at a time."""
        for values, labels in zip(self.values.split(rows), self.labels.split(rows), strict=True):
            yield (values if self.mean is None or self.factor is None else (values - self.mean) * self.factor), labels


@dataclass(frozen=True, slots=True)
class Hits:
    """Numbers of queries: scored, and right."""

    right: Mapping[int, int]
    """By k: the number of queries whose true class is among the k best."""
    images: int
    facts: Mapping[str, float] = field(default_factory=dict)
    """Further values of the score, by name."""
    is_cut: bool = False
    """True if time ended the learning from the bank."""


Score = Callable[[Features, Features, float], Hits]
"""From the features of bank and queries, and the time of `time.perf_counter` at which it must end."""


@dataclass(frozen=True)
class FeatureReport:
    """A score of features."""

    title: str
    values: Mapping[str, float]
    """`top1`, and `top5` where there are more than five classes: fractions in 0..1."""
    facts: Mapping[str, float]
    """Further values of the score, by name."""
    bank: int
    """Images that were learned from."""
    queries: int
    """Images that were scored."""
    is_cut: bool = False
    """True if time ended the learning from the bank."""

    def lines(self) -> list[str]:
        """One line for a reader."""
        scores = [f"{name.replace('top', 'top-')} {value:.2%}" for name, value in self.values.items()]
        return [f"{self.title} {'  '.join(scores)}  ({self.queries:,} images, learned from {self.bank:,})"]

    def as_dict(self) -> dict[str, object]:
        """The same as plain values for JSON."""
        return {**self.values, **self.facts, "images": self.queries, "bank": self.bank, "cut": self.is_cut}


class FeatureScore:
    """Scores the features of a method each time it is asked; implements `Evaluator`."""

    def __init__(
        self, config: FeatureScoreConfig, context: EvaluationContext, prefix: str, *, title: str, score: Score
    ) -> None:
        """Build the evaluator of `score`, which reports call `title`.

        Raises:
            ConfigError: the labelled images do not allow it.
        """
        self._config = config
        self._context = context
        self._labelled = context.labelled(config.choice, f"evaluators.{prefix}")
        self._title = title
        self._score = score
        self._seconds = math.inf if config.seconds is None else config.seconds
        self._share = 1.0
        """Share of the images that memory suffices for."""

    def evaluate(self, method: FeatureNetwork) -> Mapping[str, float]:
        """`top1`, and `top5` where there are more than five classes.

        If time, memory or unreadable images left some out, also `bank` and `queries`, the numbers of images learned
        from and scored; if time ended the learning, also `cut`, which is 1.
        """
        report = self.report(method)
        used = {"bank": report.bank, "queries": report.queries}
        wanted = {"bank": self._labelled.bank.facts.samples, "queries": self._labelled.queries.facts.samples}
        missing = {name: float(count) for name, count in used.items() if count < wanted[name]}
        return {**report.values, **missing, **({"cut": 1.0} if report.is_cut else {})}

    def report(self, method: FeatureNetwork) -> FeatureReport:
        """The score, and the numbers of images behind it.

        Raises:
            DataError: no image can be read.
        """
        started = time.perf_counter()
        while True:
            try:
                return self._report(method, started)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or max(self._counts()) <= self._config.batch_size:
                    raise
            # Here and not above: with the error go the frames that it holds, and with these the tensors in them.
            self._context.features.keep(None)
            release_memory(self._context.device)
            before, self._share = self._counts(), self._share / 2
            queries, bank = self._counts()
            self._context.teller.warning(
                f"{self._title}: out of memory with features of {sum(before):,} images: from here on it scores "
                f"{queries:,} and learns from {bank:,}"
            )

    def _report(self, method: FeatureNetwork, started: float) -> FeatureReport:
        found = self._features(method, started)
        with torch.no_grad(), exact_products():
            hits = self._score(found.bank, found.queries, started + self._seconds)
        values = {f"top{k}": count / hits.images for k, count in hits.right.items()}
        return FeatureReport(self._title, values, hits.facts, len(found.bank.labels), hits.images, hits.is_cut)

    def _counts(self) -> tuple[int, int]:
        """Images to score, and to learn from."""
        queries, bank = self._labelled.queries.facts.samples, self._labelled.bank.facts.samples
        return math.ceil(self._share * queries), math.ceil(self._share * bank)

    def _features(self, method: FeatureNetwork, started: float) -> "_Extracted":
        """The features of bank and queries, or of their first images; those of another score if they serve."""
        config, sets = self._config, (self._labelled.queries, self._labelled.bank)
        # Batches of another size round differently, and sharing must not change a score.
        key = (method, self._labelled, config.batch_size, config.blocks, self._share)
        kept = self._context.features.kept
        if isinstance(kept, _Extracted) and kept.key == key and (kept.is_whole or self._seconds <= kept.seconds):
            return kept
        images = self._counts()
        # The queries first, in their share of the time: the bank gets the rest.
        ends = [started + _FEATURES_SHARE * self._seconds * part for part in (images[0] / sum(images), 1.0)]
        queries, bank = (
            extract(
                method,
                data,
                autocast=self._context.autocast,
                device=self._context.device,
                batch_size=config.batch_size,
                blocks=config.blocks,
                until_s=until_s,
                most=count,
            )
            for data, until_s, count in zip(sets, ends, images, strict=True)
        )
        is_whole = images == (len(queries.labels), len(bank.labels))
        found = _Extracted(key, self._seconds, bank, queries, is_whole)
        self._context.features.keep(found)
        return found


@dataclass(frozen=True, slots=True)
class _Extracted:
    """Features of bank and queries, with all that they depend on."""

    key: tuple[FeatureNetwork, Labelled, int, int, float]
    """Network, images, batch size, number of blocks and share of the images."""
    seconds: float
    """Time for the evaluation."""
    bank: Features
    queries: Features
    is_whole: bool
    """False if time was too short for some images."""


def extract(
    network: FeatureNetwork,
    data: StillData,
    *,
    autocast: Callable[[], AbstractContextManager[None]],
    device: torch.device,
    batch_size: int = 256,
    blocks: int = 1,
    until_s: float = math.inf,
    most: int | None = None,
) -> Features:
    """The pooled features of all images of `data`, or of its first `most`, as far as they come by `until_s`.

    Those of the last `blocks` blocks are concatenated. `until_s` is a time of `time.perf_counter`; one batch is
    always computed. Leaves weights, modes and random numbers as they are.

    Raises:
        DataError: there is no image.
    """
    values: Tensor | None = None
    labels: list[Tensor] = []
    most, done = data.facts.samples if most is None else most, 0
    with untouched(network, device):
        for batch in data.batches(batch_size):
            batch = batch.to(device)
            with autocast():
                pooled = _pooled(network, batch.views["image"][0], blocks)
            if values is None:  # all of them in one tensor from the beginning: joined later, they would be held twice
                values = torch.empty(most, pooled.shape[1], device=device)
            count = min(len(pooled), most - done)
            values[done : done + count] = pooled[:count]  # [B, D], or [B, blocks D]
            labels.append(batch.labels[:count])
            done += count
            if done == most < data.facts.samples:
                break
            if math.isfinite(until_s):
                pooled.sum().item()  # waits for the GPU, which runs behind
                if time.perf_counter() >= until_s:
                    break
    if values is None:
        raise DataError("there are no labelled images to score features with; check the path of the evaluator")
    return Features(values[:done], torch.cat(labels), len(data.facts.classes))


def _pooled(network: FeatureNetwork, images: Tensor, blocks: int) -> Tensor:
    if blocks == 1:
        return network.encode(images).pooled
    assert isinstance(network, Method), "FeatureScoreConfig.check has seen one"
    return network.backbone.pool_blocks(images, blocks)


def count_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of images whose true class is among the best: int64, one for each of `kept_tops`.

    `scores` is [N, K]. Of equal scores the first classes count as better, on every device. A score that is not finite
    and a label -1 count as wrong.
    """
    tops = kept_tops(scores.shape[1])
    scores = scores.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    own = scores.gather(1, labels.clamp(min=0)[:, None])  # [N, 1]
    is_before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]  # [N, K]
    rank = ((scores > own) | (is_before & (scores == own))).sum(1)
    may_count = own[:, 0].isfinite() & (labels >= 0)
    hits = [((rank < k) & may_count).sum() for k in tops]
    return torch.stack(hits) if hits else labels.new_empty(0)


def kept_tops(num_classes: int) -> tuple[int, ...]:
    """The k of top-k scores: those for which not every guess would be right."""
    return tuple(k for k in TOPS if k < num_classes)
