"""The interface of a training method: one `nn.Module` from a batch to losses.

The file of a method holds its networks, views, loss, teacher update and parameter groups. The loop
calls it through this interface only. A new method needs a subclass of `Method` and of `MethodConfig`:
the recipe finds the config by its `name`, the contract tests find the method.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from opsin.clock.schedule import Schedule
from opsin.clock.timeline import Clock
from opsin.data.base import Batch, DataFacts, Views
from opsin.nn.backbone import Backbone, ModelConfig, Tokens
from opsin.settings.family import Family

__all__ = ["Batch", "Clock", "DataFacts", "Losses", "Method", "MethodConfig", "ParamGroup", "Tokens", "Views"]


@dataclass(frozen=True, slots=True)
class Losses:
    """The result of one forward pass. `total` is a scalar, the mean over the images of the batch."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Unweighted terms, logged as `loss/<name>`."""
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached measurements, logged as `train/<name>`."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached feature vectors [N, D] by encoder (`student`, `teacher`), for monitors.

    Names of a predictor's features begin with `prediction`: monitors measure them without a verdict."""


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share an update rule. `lr_factor` multiplies the learning rate."""

    name: str
    params: Sequence[nn.Parameter]
    decay: bool = True
    lr_factor: float | Callable[[Clock], float] = 1.0
    hidden: bool = False
    """True if these are the matrices and filters inside the network, which Muon updates by its own rule."""


class Method(nn.Module, ABC):
    """A learning algorithm. Its parameters and buffers are its whole state."""

    backbone: Backbone
    """The network that `encode` uses, that receives the starting weights and that is exported."""

    @property
    def trained_backbone(self) -> Backbone:
        """The network that learns; it differs from `backbone` if that is a teacher."""
        return self.backbone

    @abstractmethod
    def views(self, image_size: int) -> Views:
        """The crops, augmentation and masks of a batch, for training images of this side in pixels."""

    @abstractmethod
    def forward(self, batch: Batch, clock: Clock) -> Losses:
        """The losses of a batch. Called through DDP or FSDP; changes no parameter."""

    @abstractmethod
    def param_groups(self) -> Sequence[ParamGroup]:
        """Every trainable parameter, once."""

    def encode(self, images: Tensor) -> Tokens:
        """Features of normalised images [B, C, S, S], as evaluation scores them."""
        tokens: Tokens = self.backbone(images)
        return tokens

    def checkpoint_blocks(self) -> bool:
        """Compute each block that learns once more in the backward pass, from now on; False without blocks."""
        return self.trained_backbone.checkpoint_blocks()

    def compile_networks(self, backend: str = "inductor") -> None:
        """Compile the networks from their next call on.

        What follows from the clock (temperatures, layers at rest) is computed outside of them: compiled code would be
        made again with each new value.
        """
        for part in self.modules():
            if isinstance(part, Backbone):
                part.compile_layers(backend)

    def schedules(self) -> Mapping[str, Schedule]:
        """The schedules in the settings, by their keys."""
        return {}

    def prepare(self, first_batch: Callable[[], Batch]) -> None:
        """Initialise from data, once before step 0. Must be deterministic.

        `first_batch` loads the batch of step 0; a method that needs no images does not call it.
        """

    def chunks(self, batch: Batch, clock: Clock, views: int) -> Iterator[Batch]:
        """Pieces of a batch with up to `views` views each; the losses of the pieces sum to those of the batch.

        Each piece is computed forward and backward before the next one, so that memory holds the
        activations of one piece. Only a method that sees several views of an image has pieces.
        """
        raise NotImplementedError(f"{type(self).__name__} has one view of an image")

    def advice(self, finding: str, clock: Clock) -> str:
        """Advice to the reader of a monitor's `finding`; empty if the method has none."""
        return ""

    def before_update(self, clock: Clock) -> None:
        """Cancel or scale gradients, which are final (clipped) here."""

    def after_update(self, clock: Clock, applied: Tensor) -> None:
        """Update teachers and centres after the weights have moved.

        `applied` is a scalar on the device, 1 when the update was made and 0 when a non-finite
        loss or gradient cancelled it; every change must be scaled by it.
        """


class MethodConfig(Family, ABC):
    """The settings of a method; defaults are the published values."""

    published: ClassVar[str | None] = None
    """The shipped recipe with the published settings; other recipes are compared with it."""

    @abstractmethod
    def build(self, model: ModelConfig, facts: DataFacts) -> Method:
        """The method with fresh weights, on the CPU.

        Raises:
            ConfigError: the data lacks something that the method needs, such as labels.
        """


def split_by_decay(
    module: nn.Module, *, name: str = "", lr_factor: float | Callable[[Clock], float] = 1.0, hidden: bool = False
) -> list[ParamGroup]:
    """The trainable parameters of `module`: matrices and filters with weight decay; biases, norms and all 1-D without.

    With `hidden`, the weights of linear and convolution layers form a group of their own, except the first layer's.
    """
    params = [param for param in module.parameters() if param.requires_grad]
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    inside = {id(layer.weight) for layer in layers[1:]} if hidden else set()
    groups = [
        ParamGroup(f"{name}hidden", [p for p in params if id(p) in inside], True, lr_factor, hidden=True),
        ParamGroup(f"{name}decay", [p for p in params if p.ndim > 1 and id(p) not in inside], True, lr_factor),
        ParamGroup(f"{name}no_decay", [p for p in params if p.ndim <= 1], False, lr_factor),
    ]
    return [group for group in groups if group.params]
