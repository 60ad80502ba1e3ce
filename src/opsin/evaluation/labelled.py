"""The labelled images that scores of features are made from: some to learn from, others to score.

Shapes: N images of a source, n of them with a label, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from opsin.clock import seeding
from opsin.data.base import Source
from opsin.data.holdout import Subset, hold_out
from opsin.data.sources.labels import Opened
from opsin.errors import ConfigError, DataError
from opsin.training.evaluator import Labelled, LabelledChoice, StillData


class LabelledImages:
    """Opens each choice once; implements `EvaluationContext.labelled`.

    Which images these are is the same in every run, whatever its seed.
    """

    def __init__(
        self,
        train: Source,
        val: Source | None,
        *,
        open_path: Callable[[str], Opened],
        still: Callable[[Source], StillData],
    ) -> None:
        """`train` and `val` are the run's own images; `still` shows those of a source as evaluators see them."""
        self._train = train
        self._val = val
        self._open_path = open_path
        self._still = still
        self._opened: dict[LabelledChoice, Labelled] = {}

    def __call__(self, choice: LabelledChoice, key: str) -> Labelled:
        """Images to learn from and images to score; without a label is none of them.

        Raises:
            ConfigError: a fault of the evaluator `key`: no labels, nothing to score, or classes that differ.
        """
        if choice not in self._opened:
            bank, queries = (self._train, self._val) if choice.path is None else self._open(choice, key)
            bank, queries = check_labels(bank, queries, key, own=choice.path is None)
            self._opened[choice] = Labelled(
                self._still(spread(bank, choice.bank_images)), self._still(spread(queries, choice.query_images))
            )
        return self._opened[choice]

    def _open(self, choice: LabelledChoice, key: str) -> tuple[Source, Source]:
        assert choice.path is not None
        try:
            opened = self._open_path(choice.path)
            if opened.val is not None:
                return opened.train, opened.val
            return hold_out(opened.train, choice.holdout, seed=0)
        except DataError as error:
            raise ConfigError(*(f"{key}.path={choice.path}: {fault}" for fault in error.faults)) from error


def check_labels(bank: Source, queries: Source | None, key: str, *, own: bool) -> tuple[Source, Source]:
    """The two, if a score of features can be made from them; `own` are the images of the run itself.

    Raises:
        ConfigError: it cannot be.
    """
    way_out = f"set {key}.path to labelled images, or {key}=null for no score"
    which = "training images" if own else f"images at {key}.path"
    if not bank.classes or not (bank.labels >= 0).any():
        raise ConfigError(f"{key}: the {which} have no labels, which this score needs; {way_out}")
    if len(bank.classes) == 1:
        raise ConfigError(
            f"{key}: the {which} have only one class, {bank.classes[0]!r}; this score needs two; {way_out}"
        )
    if queries is None:
        raise ConfigError(f"{key}: there are no validation images to score; set data.holdout above 0, {way_out}")
    if queries.classes != bank.classes:
        shown = ", ".join(sorted(set(queries.classes) ^ set(bank.classes))[:3]) or "in another order"
        raise ConfigError(
            f"{key}: the {which} have {len(bank.classes)} classes, their validation images {len(queries.classes)}, "
            f"and these are not the same ({shown}); both need equal classes: {way_out}"
        )
    if not (queries.labels >= 0).any():
        raise ConfigError(f"{key}: the validation images have no labels, which this score needs; {way_out}")
    return bank, queries


def spread(source: Source, limit: int | None = None) -> Subset:
    """The first `limit` labelled images in the order of `spread_classes`, all of them if None."""
    return Subset(source.name, source, spread_classes(source.labels)[:limit])


def spread_evenly(source: Source, count: int) -> Subset:
    """`count` images at even distances, labelled or not; all of them if there are fewer."""
    count = min(count, len(source))
    return Subset(source.name, source, torch.arange(count) * len(source) // count)


def spread_classes(labels: Tensor) -> Tensor:
    """Indices of the labelled images, int64 [n], in an order whose every beginning is stratified.

    Of the first m images of n, a class with c images has c * m / n, within one. Which images of a class
    come first is drawn once for all by `(0, index)`; label -1 is left out.
    """
    ids = (labels >= 0).nonzero()[:, 0]  # [n]
    ids = ids[seeding.uniform(0, 0, ids, "spread", 1)[:, 0].argsort(stable=True)]
    ids = ids[labels[ids].argsort(stable=True)]  # class after class, each in the order of its draws
    counts = torch.bincount(labels[ids])  # [K]
    rank = torch.arange(len(ids)) - (counts.cumsum(0) - counts)[labels[ids]]  # [n], within the class
    share = (rank + 0.5) / counts[labels[ids]].double()
    return ids[share.argsort(stable=True)]
