"""Evaluators: the interface of scores, the context that they get, and how they leave a network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
from opsin.storage.teller import Silence, Teller


class StillData(Protocol):
    """Images in a fixed order, each once, not augmented."""

    facts: DataFacts

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Batches with the view `image` [1, B, C, S, S]; the last may be smaller."""


@dataclass(frozen=True, slots=True)
class LabelledChoice:
    """The labelled images that a score of features asks for."""

    path: str | None = None
    """Images as in `data.path`; None takes the run's own training and validation images."""
    holdout: float = 0.2
    """Share of the images at `path` that are scored, where they have no split of their own."""
    bank_images: int | None = None
    """The largest number of images to learn from; None for all."""
    query_images: int | None = None
    """The largest number of images to score; None for all."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Two sets with the same classes and no image in common, every image with a label.

    Each is in an order whose every beginning has the classes in their proportions.
    """

    bank: StillData
    """Images to learn from."""
    queries: StillData
    """Images to score."""


class FeatureCache:
    """Features that several evaluators need. Features are reused only while the weights are unchanged.

    The caller of the evaluators guarantees that: `with context.features.weights_unchanged():`. Outside of this block
    nothing is kept.
    """

    def __init__(self) -> None:
        self._is_open = False
        self.kept: object = None
        """The features that were kept last; None if there are none."""

    @contextmanager
    def weights_unchanged(self) -> Iterator[None]:
        """Keep features inside this block, in which the weights stay as they are."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open, self.kept = False, None

    def keep(self, features: object) -> None:
        """Replace the features that are kept."""
        if self._is_open:
            self.kept = features


@dataclass(frozen=True, slots=True)
class EvaluationContext:
    """The images, the device and the files that evaluators of a run may use."""

    validation: StillData | None
    labelled: Callable[[LabelledChoice, str], Labelled]
    """Return the chosen labelled images; the text names the evaluator in faults (`evaluators.knn`).

    Raises:
        ConfigError: there are none, or they do not fit together.
    """
    sample: Callable[[int], StillData]
    """Return this number of images at even distances from the validation images, or from the training images if there
    are none of these; labelled or not."""
    autocast: Callable[[], AbstractContextManager[None]]
    device: torch.device
    folder: Path
    """The run directory."""
    write: Callable[[Path, bytes], None] = write_whole
    """Write a file of an evaluator; in a run, a full disk costs the file and not the score."""
    features: FeatureCache = field(default_factory=FeatureCache)
    """Features of the current weights, shared by evaluators."""
    teller: Teller = field(default_factory=Silence)
    """Reports what an evaluator had to leave out."""


class Network(Protocol):
    """The part of `nn.Module` that `untouched` needs."""

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> object: ...


@contextmanager
def untouched(network: Network, device: torch.device) -> Iterator[None]:
    """Inside, `network` is in eval mode and without gradients; after, modes and random numbers are as before.

    Compiled code is not used inside: scores do not depend on the compiler, and no form of the last batch is compiled.
    """
    modes = [(module, module.training) for module in network.modules()]
    is_compiled = any(module._compiled_call_impl is not None for module, _ in modes)
    with ExitStack() as inside:
        if is_compiled:
            inside.enter_context(torch.compiler.set_stance("force_eager"))
        inside.enter_context(torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type))
        # Not inference_mode: a tensor that a module keeps from inside it could not be used in training.
        inside.enter_context(torch.no_grad())
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


@runtime_checkable
class StepEvaluator(Evaluator, Protocol):
    """An evaluator that also leaves files for each step."""

    step: int
    """Number of updates behind the weights; set before each call of `evaluate`."""


class EvaluatorConfig(Family, ABC):
    """An evaluator in a recipe; its key is the prefix of its scores."""

    every: StepEvery = "1 epoch"
    """Interval between evaluations. The end of the run is always evaluated."""

    @abstractmethod
    def build(self, context: EvaluationContext, prefix: str) -> Evaluator:
        """Return the evaluator; `prefix` is its key in the recipe.

        Raises:
            ConfigError: the context lacks what it needs (validation images, say).
        """

    def check(self, method: Method, prefix: str) -> None:
        """Refuse a method that the evaluator cannot score.

        Raises:
            ConfigError: it cannot.
        """
        return
