"""What every method may rely on in a network: images in, `Tokens` out.

Shapes: B images, C channels, S side in pixels, N patches, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from opsin.config import Family


@dataclass(frozen=True, slots=True)
class Tokens:
    """Features of a batch: one vector per image and one per place of the final grid."""

    pooled: Tensor
    """[B, D]"""
    patches: Tensor
    """[B, N, D], row by row."""


class Backbone(nn.Module, ABC):
    """A network without a head."""

    width: int
    """D, the size of a feature vector."""
    image_size: int
    """The side in pixels that the weights are laid out for."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, S, S] to features."""

    def prepare(self, images: Callable[[], Tensor]) -> None:
        """Initialise from data, where the architecture does: `images` loads some, as `forward` takes them."""


class ModelConfig(Family, ABC):
    """The settings of a backbone."""

    weights: str | None = None
    """Start from these weights: a .safetensors or .pt file, a run directory, or `pretrained` for timm's own."""

    @abstractmethod
    def build(self, *, image_size: int, channels: int = 3) -> Backbone:
        """The network with fresh weights, on the CPU.

        Raises:
            ConfigError: the settings do not fit together or the image size.
        """
