"""What a training method is: one `nn.Module` from a batch to losses.

A method file holds its networks, views, loss, teacher update and parameter groups together. The
loop calls it through this interface only. Subclassing `Method` and `MethodConfig` is all that a
new method needs: the recipe finds the config by its `name`, the contract tests find the method.
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
    """What one forward pass says. `total` is a scalar, the mean over the images of the batch."""

    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Unweighted terms, logged as `loss/<name>`."""
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached facts without gradient, logged as `train/<name>`."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached feature vectors [N, D] by encoder (`student`, `teacher`), for monitors.

    Those of a predictor have names that begin with `prediction`: they are measured, but say nothing of a collapse."""


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share an update rule. `lr_factor` multiplies the learning rate."""

    name: str
    params: Sequence[nn.Parameter]
    decay: bool = True
    lr_factor: float | Callable[[Clock], float] = 1.0
    hidden: bool = False
    """Whether these are the matrices and filters inside the network, which Muon treats on their own."""


class Method(nn.Module, ABC):
    """A learning algorithm. Its parameters and buffers are its whole state."""

    backbone: Backbone
    """The network that `encode` uses: starting weights are loaded into it, and it is what is exported."""

    @property
    def trained_backbone(self) -> Backbone:
        """The network that learns; another one than `backbone` where that is a teacher."""
        return self.backbone

    @abstractmethod
    def views(self, image_size: int) -> Views:
        """The crops, augmentation and masks that a batch contains, where training images have this side in pixels."""

    @abstractmethod
    def forward(self, batch: Batch, clock: Clock) -> Losses:
        """The losses of a batch. Called through DDP, FSDP or compile; changes no parameter."""

    @abstractmethod
    def param_groups(self) -> Sequence[ParamGroup]:
        """Every trainable parameter, once."""

    def encode(self, images: Tensor) -> Tokens:
        """Features of normalised images [B, C, S, S], as evaluation scores them."""
        tokens: Tokens = self.backbone(images)
        return tokens

    def checkpoint_blocks(self) -> bool:
        """From now on, compute each block that learns once more in the backward pass; False where there are none."""
        return self.trained_backbone.checkpoint_blocks()

    def schedules(self) -> Mapping[str, Schedule]:
        """The schedules that its settings hold, by their keys."""
        return {}

    def prepare(self, first_batch: Callable[[], Batch]) -> None:
        """Once, before step 0: initialisation from data. Must be deterministic.

        `first_batch` loads the batch of step 0; a method that needs no images does not call it.
        """

    def chunks(self, batch: Batch, clock: Clock, views: int) -> Iterator[Batch]:
        """Pieces of a batch with up to `views` views each; the sums of what `forward` says of them are the batch's.

        Each is computed forward and backward before the next is asked for, so that the activations of
        one piece are in memory at a time. Only a method that sees several views of an image has pieces.
        """
        raise NotImplementedError(f"{type(self).__name__} has one view of an image")

    def advice(self, trouble: str, clock: Clock) -> str:
        """What to change when a monitor finds `trouble`, for a reader; empty where the method knows nothing."""
        return ""

    def before_update(self, clock: Clock) -> None:
        """Gradients are final (clipped); a method may cancel or scale some."""

    def after_update(self, clock: Clock, applied: Tensor) -> None:
        """Weights have moved: update teachers and centres.

        `applied` is a scalar on the device, 1 when the update was made and 0 when a non-finite
        loss or gradient cancelled it; every change must be scaled by it.
        """


class MethodConfig(Family, ABC):
    """The settings of a method; defaults are the published values."""

    published: ClassVar[str | None] = None
    """The shipped recipe with the settings of the publication, which others are compared with."""

    @abstractmethod
    def build(self, model: ModelConfig, facts: DataFacts) -> Method:
        """The method with fresh weights, on the CPU.

        Raises:
            ConfigError: the data lacks what the method needs (labels, say).
        """


def split_by_decay(
    module: nn.Module, *, name: str = "", lr_factor: float | Callable[[Clock], float] = 1.0, hidden: bool = False
) -> list[ParamGroup]:
    """The trainable parameters of `module`: matrices and filters with weight decay; biases, norms and all 1-D without.

    With `hidden`, the weights of its linear and convolution layers stand apart, save those of the first layer.
    """
    params = [param for param in module.parameters() if param.requires_grad]
    inside = {id(weight) for weight in _layer_weights(module)[1:]} if hidden else set()
    groups = [
        ParamGroup(f"{name}hidden", [p for p in params if id(p) in inside], True, lr_factor, hidden=True),
        ParamGroup(f"{name}decay", [p for p in params if p.ndim > 1 and id(p) not in inside], True, lr_factor),
        ParamGroup(f"{name}no_decay", [p for p in params if p.ndim <= 1], False, lr_factor),
    ]
    return [group for group in groups if group.params]


def _layer_weights(module: nn.Module) -> list[Tensor]:
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [layer.weight for layer in module.modules() if isinstance(layer, layers)]
