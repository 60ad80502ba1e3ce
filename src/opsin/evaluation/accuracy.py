"""Accuracy of a classifier, and its confusions.

Shapes: B images of a batch, C channels, S side in pixels, K classes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from opsin.errors import ConfigError, DataError
from opsin.evaluation.features import count_hits, kept_tops
from opsin.methods.base import Method
from opsin.training.evaluator import EvaluationContext, EvaluatorConfig, Network, untouched


class AccuracyConfig(EvaluatorConfig):
    """Top-1 and top-5 accuracy, loss and confusion on the validation images."""

    name: Literal["accuracy"] = "accuracy"
    batch_size: int = Field(256, gt=0)
    """Images per forward pass; changes speed and memory, not scores."""
    views: Literal[1, 2, 6] = 1
    """Views of an image whose probabilities are averaged: 1 is the image, 2 adds its mirror image, 6 both shifted by
    a pixel to either side as well. Each view costs a forward pass; report their number beside the score."""

    def build(self, context: EvaluationContext, prefix: str) -> "Accuracy":
        if context.validation is None:
            raise ConfigError(
                f"evaluators.{prefix}: there are no validation images to score; set data.holdout above 0, "
                f"or evaluators.{prefix}=null for no score"
            )
        if not context.validation.facts.classes:
            raise ConfigError(
                f"evaluators.{prefix}: the validation images have no labels, which the score accuracy needs; "
                "add labels, or remove this score"
            )
        return Accuracy(self, context, prefix)

    def check(self, method: Method, prefix: str) -> None:
        if not isinstance(method, Classifier):
            raise ConfigError(
                f"evaluators.{prefix}: the score accuracy needs class scores, which a {type(method).__name__} does not "
                f"give; take it out and score its features: evaluators.{prefix}=null evaluators.knn.name=knn"
            )


@runtime_checkable
class Classifier(Network, Protocol):
    """A network with class scores."""

    def logits(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of normalised images [B, C, S, S]."""
        ...


@dataclass(frozen=True)
class AccuracyReport:
    """Scores of a classifier. Accuracies are fractions in 0..1."""

    values: Mapping[str, float]
    """`top1`, `loss` (mean cross-entropy), and `top5` where there are more than five classes."""
    confusion: Tensor
    """int64 [K, K]: row = true class, column = predicted class."""
    classes: tuple[str, ...]
    images: int

    @property
    def per_class(self) -> dict[str, float]:
        """Share of each class that is recognised; NaN where it has no image."""
        shares = self.confusion.diagonal() / self.confusion.sum(1)
        return dict(zip(self.classes, shares.tolist(), strict=True))

    def as_dict(self) -> dict[str, object]:
        """The same as plain values for JSON; NaN becomes null."""
        return {
            **self.values,
            "images": self.images,
            "classes": list(self.classes),
            "per_class": {name: None if math.isnan(share) else share for name, share in self.per_class.items()},
            "confusion": self.confusion.tolist(),
        }

    def lines(self, worst: int = 5) -> list[str]:
        """Scores, the `worst` classes and the most frequent confusions, for a reader."""
        percent = {"top1": "top-1", "top5": "top-5"}
        scores = [f"{percent[name]} {value:.2%}" for name, value in self.values.items() if name in percent]
        lines = [f"{'  '.join(scores)}  loss {self.values['loss']:.4f}  ({self.images:,} images)"]
        seen = self.confusion.sum(1).tolist()
        found = [(share, name, seen[k]) for k, (name, share) in enumerate(self.per_class.items()) if seen[k]]
        if imperfect := [entry for entry in sorted(found) if entry[0] < 1.0][:worst]:
            width = max(len(name) for _, name, _ in imperfect)
            lines += ["", "least accurate classes"]
            lines += [f"  {name:{width}}  {share:7.2%} of {count:,}" for share, name, count in imperfect]
        if mistakes := self._mistakes()[:worst]:
            width = max(len(true) for _, true, _ in mistakes)
            lines += ["", "most frequent confusions"]
            lines += [f"  {true:{width}}  taken for {taken}  {count:,} times" for count, true, taken in mistakes]
        return lines

    def _mistakes(self) -> list[tuple[int, str, str]]:
        wrong = self.confusion.clone().fill_diagonal_(0)
        counts = [(int(wrong[i, j]), self.classes[i], self.classes[j]) for i, j in wrong.nonzero().tolist()]
        return sorted(counts, key=lambda count: -count[0])


class Accuracy:
    """Scores a method on the validation images; implements `Evaluator`."""

    def __init__(self, config: AccuracyConfig, context: EvaluationContext, prefix: str = "val") -> None:
        self._config = config
        self._context = context
        self._file = "confusion.json" if prefix == "val" else f"confusion_{prefix}.json"

    def evaluate(self, method: Method) -> Mapping[str, float]:
        """`top1`, `loss`, and `top5` if there are more than five classes. The run directory gets the confusions.

        Raises:
            DataError: see `report`.
        """
        assert isinstance(method, Classifier), "checked when the run was assembled"
        report = self.report(method)
        self._context.write(self._context.folder / self._file, (json.dumps(report.as_dict()) + "\n").encode())
        return report.values

    def report(self, method: Classifier) -> AccuracyReport:
        """The scores on all labelled validation images.

        Weights, train mode and random numbers stay as they are. Nothing is read from the device before the end.

        Raises:
            DataError: there is no labelled image, or the classes are not those of the network.
        """
        context, data = self._context, self._context.validation
        assert data is not None, "checked when the evaluator was built"
        classes = data.facts.classes
        tops = kept_tops(len(classes))
        confusion = torch.zeros(len(classes) ** 2, dtype=torch.int64, device=context.device)
        hits = torch.zeros(len(tops), dtype=torch.int64, device=context.device)
        loss = torch.zeros((), dtype=torch.float64, device=context.device)
        with untouched(method, context.device):
            for batch in data.batches(self._config.batch_size):
                batch = batch.to(context.device)
                with context.autocast():
                    seen = [method.logits(view) for view in show(batch.views["image"][0], self._config.views)]
                logits = mean_scores([logits.float() for logits in seen])  # [B, K]
                if logits.shape[1] != len(classes):
                    raise DataError(
                        f"the network distinguishes {logits.shape[1]} classes, the data has {len(classes)}; "
                        "evaluate on data with the classes it was trained on"
                    )
                known = batch.labels >= 0
                hits += count_hits(logits, batch.labels)
                cells = batch.labels.clamp(min=0) * len(classes) + logits.argmax(1)  # of equals the first
                confusion.index_add_(0, cells, known.to(torch.int64))
                loss += F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="sum")
        images = int(confusion.sum())
        if images == 0:
            raise DataError(
                "the validation images have no labels, which the score accuracy needs; add labels or drop the score"
            )
        values = {f"top{k}": count / images for k, count in zip(tops, hits.tolist(), strict=True)}
        table = confusion.view(len(classes), len(classes)).cpu()
        return AccuracyReport({**values, "loss": loss.item() / images}, table, classes, images)


def show(images: Tensor, views: int) -> list[Tensor]:
    """The images [B, C, S, S] as they are, mirrored, and both of these shifted along the diagonal: 1, 2 or 6 views."""
    if views == 1:
        return [images]
    both = [images, images.flip(-1)]
    if views == 2:
        return both
    side = images.shape[-1]
    padded = [F.pad(view, (1, 1, 1, 1), "reflect") for view in both]
    return both + [view[..., at : at + side, at : at + side] for at in (0, 2) for view in padded]


def mean_scores(logits: list[Tensor]) -> Tensor:
    """The logarithm of the mean probabilities; one table of scores [B, K] is left as it is."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack(logits).log_softmax(-1).logsumexp(0) - math.log(len(logits))
