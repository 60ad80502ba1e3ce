"""What evaluators may look at, and how they leave it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from opsin.clock.cadence import StepEvery
from opsin.data.base import Batch, DataFacts
from opsin.methods.base import Method
from opsin.settings.family import Family
from opsin.storage.files import write_whole


class StillData(Protocol):
    """Images in a fixed order, each once, not augmented."""

    facts: DataFacts

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches with the view `image` [1, B, C, S, S]; the last may be smaller."""
        ...


@dataclass(frozen=True, slots=True)
class LabelledChoice:
    """Which labelled images a score of features is made from."""

    path: str | None = None
    """What `data.path` could be; None takes the run's own training and validation images."""
    holdout: float = 0.2
    """Share of the images at `path` that are scored, where they have no split of their own."""
    bank_images: int | None = None
    """At most so many to learn from."""
    query_images: int | None = None
    """At most so many to score."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Two sets with the same classes and no image in common, every image with a label.

    Each is in an order whose every beginning has the classes in their proportions.
    """

    bank: StillData
    """What is learned from."""
    queries: StillData
    """What is scored."""


class SameWeights:
    """What an evaluator found out about the weights that it was shown, kept for others that are shown the same.

    Who shows them says so, `with scene.same_weights.shown():`. Outside of that nothing is kept, so that nothing is
    ever of other weights.
    """

    def __init__(self) -> None:
        self._are_shown = False
        self._found: object = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, nobody changes the weights; afterwards what was found is forgotten."""
        self._are_shown = True
        try:
            yield
        finally:
            self._are_shown, self._found = False, None

    @property
    def found(self) -> object:
        """What was kept last; None before."""
        return self._found

    def keep(self, found: object) -> None:
        """Keep this for the others in the place of what was kept before."""
        if self._are_shown:
            self._found = found


@dataclass(frozen=True, slots=True)
class Scene:
    """What evaluators may look at."""

    validation: StillData | None
    labelled: Callable[[LabelledChoice, str], Labelled]
    """The chosen labelled images; the text is what faults call the evaluator (`evaluators.knn`).

    Raises:
        ConfigError: there are none, or they do not fit together.
    """
    sample: Callable[[int], StillData]
    """So many images, evenly from all validation images, or the training images without these; also unlabelled ones."""
    autocast: Callable[[], AbstractContextManager[None]]
    device: torch.device
    folder: Path
    """The run directory."""
    write: Callable[[Path, bytes], None] = write_whole
    """Puts what an evaluator leaves into a file; no score is worth less because a disk is full."""
    same_weights: SameWeights = field(default_factory=SameWeights)
    """What evaluators that see the same weights share."""


class Network(Protocol):
    """What `untouched` needs of a network; every `nn.Module` has it."""

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> object: ...


@contextmanager
def untouched(network: Network, device: torch.device) -> Iterator[None]:
    """Inside, `network` is in eval mode and without gradients; after, modes and random numbers are as before."""
    modes = [(module, module.training) for module in network.modules()]
    # Not inference_mode: a tensor that a module keeps from inside it could not be used in training.
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type), torch.no_grad():
        network.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


class Evaluator(Protocol):
    """Scores of a method."""

    def evaluate(self, method: Method) -> Mapping[str, float]:
        """Scores by short name (`top1`). Must leave weights, modes and random numbers as they are."""
        ...


@runtime_checkable
class StepEvaluator(Evaluator, Protocol):
    """An evaluator that also leaves files for each step."""

    step: int
    """How many updates the weights have seen; set before each call of `evaluate`."""


class EvaluatorConfig(Family, ABC):
    """An evaluator in a recipe; the key it stands under is the prefix of its scores."""

    every: StepEvery = "1 epoch"
    """How often it runs. The end of the run is always evaluated."""

    @abstractmethod
    def build(self, scene: Scene, prefix: str) -> Evaluator:
        """The evaluator; `prefix` is the key it stands under.

        Raises:
            ConfigError: the scene lacks what it needs (validation images, say).
        """

    def check(self, method: Method, prefix: str) -> None:
        """See that the evaluator can score `method`.

        Raises:
            ConfigError: it cannot.
        """
        return
