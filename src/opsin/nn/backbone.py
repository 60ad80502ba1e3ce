"""The interface of every network: images in, `Tokens` out.

Shapes: B images, C channels, S side in pixels, N patches, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.errors import ConfigError
from opsin.settings.family import Family


@dataclass(frozen=True, slots=True)
class Tokens:
    """Features of a batch: one vector per image and one per cell of the final grid."""

    pooled: Tensor
    """[B, D]"""
    patches: Tensor
    """[B, N, D], row by row."""


class Backbone(nn.Module, ABC):
    """A network without a head."""

    width: int
    """D, the size of a feature vector."""
    image_size: int
    """The side in pixels of the images that the weights are made for."""
    channels: int
    """C, the channels of an image."""
    num_blocks: int = 1
    """Number of last blocks that `pool_blocks` can return."""
    loaded: frozenset[str] = frozenset()
    """Tensors that were filled from weights: `prepare` leaves them unchanged."""
    computed: frozenset[str] = frozenset()
    """Tensors that follow from the settings: loaded weights do not change them."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, S, S] to features."""

    def pool(self, images: Tensor) -> Tensor:
        """The pooled features [B, D] alone, with less work if the architecture allows it."""
        pooled: Tensor = self(images).pooled
        return pooled

    def pool_blocks(self, images: Tensor, blocks: int) -> Tensor:
        """Pooled features after each of the last `blocks` blocks, at most `num_blocks`, in order: [B, blocks D]."""
        assert blocks == 1, "FeatureScoreConfig.check refuses more than num_blocks"
        return self.pool(images)

    def pool_sizes(self, images: Sequence[Tensor]) -> Tensor:
        """The pooled features [M, D] of images of several sizes, one [B, C, S, S] after the other."""
        return torch.cat([self.pool(of_size) for of_size in images])

    def checkpoint_blocks(self) -> bool:
        """Compute each block once more in the backward pass, from now on; False if the network has no blocks."""
        return False

    def compile_layers(self, backend: str) -> None:
        """Compile the network from its next call on: as a whole, unless it has blocks that share their code."""
        self.compile(backend=backend)

    def layers(self) -> Mapping[str, int]:
        """The layer of each parameter by its name, 0 next to the image, without gaps."""
        return {name: 0 for name, _ in self.named_parameters()}

    def check_size(self, image_size: int, *, key: str) -> None:
        """Check that the network accepts images of the side that the recipe calls `key`.

        Raises:
            ConfigError: the network refuses them.
        """
        if image_size == self.image_size:
            return
        weight = next(self.parameters())
        images = torch.zeros(1, self.channels, image_size, image_size, device=weight.device)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                self(images)
        except ConfigError as error:
            raise ConfigError(*(f"{key}={image_size}: {fault}" for fault in error.faults)) from error
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"{key}={image_size}: the network is made for images of {self.image_size} pixels and refuses others "
                f"({first_line(error)}); keep this size, or choose a network that accepts others"
            ) from error
        finally:
            for module, training in modes:
                module.training = training

    def prepare(self, images: Callable[[], Tensor]) -> None:
        """Initialise from data if the architecture needs it: `images` loads a batch for `forward`."""


class ModelConfig(Family, ABC):
    """The settings of a backbone."""

    weights: str | None = None
    """Weights to start from: a .safetensors or .pt file, a run directory, or `pretrained` for those of timm."""

    def without_drops(self) -> "ModelConfig":
        """The same network without dropout and drop path."""
        rates = [key for key in ("dropout", "attention_dropout", "drop_path") if key in type(self).model_fields]
        return self.model_copy(update=dict.fromkeys(rates, 0.0))

    @abstractmethod
    def build(self, *, image_size: int, channels: int = 3) -> Backbone:
        """The network with fresh weights, on the CPU.

        Raises:
            ConfigError: the settings do not fit each other or the image size.
        """


def first_line(error: Exception) -> str:
    """The first line of an error's text; its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
