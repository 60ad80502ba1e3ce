"""The bundled digits as evaluators see them, and networks whose features are plain."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from opsin.data.base import DataFacts, Source
from opsin.data.loading import EvaluationData, LoadingPlan
from opsin.data.sources.digits import Digits, load_digits
from opsin.data.sources.open import open_sources
from opsin.evaluation.features import Features, FeatureScore, Score, extract
from opsin.evaluation.knn import KnnConfig
from opsin.evaluation.labelled import LabelledImages
from opsin.nn.backbone import Tokens
from opsin.training.evaluator import EvaluationContext, Labelled, LabelledChoice, StillData

CPU = torch.device("cpu")


class Pixels(nn.Module):
    """The first channel as it is."""

    def encode(self, images: Tensor) -> Tokens:
        return Tokens(images[:, 0].flatten(1), images.flatten(2))


class RandomFeatures(nn.Module):
    """A random layer, with dropout and batch norm that must stay at rest, and draws that none may notice."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(192, width, generator=generator) / 8)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)

    def encode(self, images: Tensor) -> Tokens:
        torch.rand(3)
        pooled = self.drop(self.norm(images.flatten(1) @ self.weight).relu())
        return Tokens(pooled, pooled[:, None])


class Counted(RandomFeatures):
    """Counts the images that it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def encode(self, images: Tensor) -> Tokens:
        self.images += len(images)
        return super().encode(images)


@dataclass(frozen=True)
class Pair:
    """Features of the digits: 1,438 to learn from, 359 to score."""

    bank: Features
    queries: Features


def still(source: Source) -> EvaluationData:
    """The images of a source, in its order."""
    facts = DataFacts(source.classes, len(source), 8, 3, (0.3,) * 3, (0.4,) * 3)
    return EvaluationData(LoadingPlan(source=source, facts=facts, device=CPU), resize=8)


def images_of(train: Source, val: Source | None) -> LabelledImages:
    """The labelled images of a run with these images."""
    return LabelledImages(train, val, open_path=lambda path: open_sources(path, cache=Path("nowhere")), still=still)


def digits_at(part: slice) -> Digits:
    """Some of the digits."""
    whole = load_digits()
    return replace(whole, labels=whole.labels[part], images=whole.images[part])


def context_of(validation: StillData | None, folder: Path = Path("nowhere")) -> EvaluationContext:
    """The context of a run with these validation images, and no others."""

    def sample(count: int) -> StillData:
        assert validation is not None
        return validation

    images = images_of(load_digits(), None)
    return EvaluationContext(validation, images, sample, contextlib.nullcontext, CPU, folder)


def digits_context(folder: Path) -> EvaluationContext:
    """The context of a run on the digits; its last 359 are validation images."""
    train, val = digits_at(slice(1438)), digits_at(slice(1438, None))
    return replace(context_of(still(val), folder), labelled=images_of(train, val))


def digits_labelled() -> Labelled:
    """The digits, a fifth of each class to be scored."""
    return images_of(load_digits(), None)(LabelledChoice(path="digits", holdout=0.2), "evaluators.knn")


def digits_features(network: Pixels | RandomFeatures) -> Pair:
    """What a network makes of `digits_labelled`."""
    found = digits_labelled()
    bank, queries = (
        extract(network, data, autocast=contextlib.nullcontext, device=CPU) for data in (found.bank, found.queries)
    )
    return Pair(bank, queries)


def feature_score(score: Score, *, seconds: float | None = None, batch_size: int = 256) -> FeatureScore:
    """The evaluator of a score on `digits_labelled`."""
    config = KnnConfig(path="digits", seconds=seconds, batch_size=batch_size)
    return FeatureScore(config, context_of(None), "score", title="score", score=score)
