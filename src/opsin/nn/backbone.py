"""What every method may rely on in a network: images in, `Tokens` out.

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
    channels: int
    """C, the channels of an image."""
    num_blocks: int = 1
    """How many last blocks `pool_blocks` can look at."""
    loaded: frozenset[str] = frozenset()
    """The tensors that were filled from weights: `prepare` leaves them as they are."""
    computed: frozenset[str] = frozenset()
    """Tensors that follow from the settings: weights from elsewhere do not change them."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, S, S] to features."""

    def pool(self, images: Tensor) -> Tensor:
        """The pooled features [B, D] alone, with less work where the architecture allows it."""
        pooled: Tensor = self(images).pooled
        return pooled

    def pool_blocks(self, images: Tensor, blocks: int) -> Tensor:
        """[B, blocks D]: pooled features after each of so many last blocks, at most `num_blocks`, in their order."""
        assert blocks == 1, "FeatureScoreConfig.check refuses more than num_blocks"
        return self.pool(images)

    def pool_sizes(self, images: Sequence[Tensor]) -> Tensor:
        """The pooled features [M, D] of images of several sizes, one [B, C, S, S] after the other."""
        return torch.cat([self.pool(of_size) for of_size in images])

    def checkpoint_blocks(self) -> bool:
        """From now on, compute each block once more in the backward pass; False where it has no blocks."""
        return False

    def layers(self) -> Mapping[str, int]:
        """The layer of each parameter by its name, 0 next to the image, without gaps."""
        return {name: 0 for name, _ in self.named_parameters()}

    def check_size(self, image_size: int, *, key: str) -> None:
        """See that the network takes images of another side than its own, which the recipe calls `key`.

        Raises:
            ConfigError: it does not.
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
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{key}={image_size}: the network is laid out for images of {self.image_size} pixels and takes no "
                f"others ({reason}); leave the size as it is, or take a network that does"
            ) from error
        finally:
            for module, training in modes:
                module.training = training

    def prepare(self, images: Callable[[], Tensor]) -> None:
        """Initialise from data, where the architecture does: `images` loads some, as `forward` takes them."""


class ModelConfig(Family, ABC):
    """The settings of a backbone."""

    weights: str | None = None
    """Start from these weights: a .safetensors or .pt file, a run directory, or `pretrained` for timm's own."""

    def without_drops(self) -> "ModelConfig":
        """The same network without dropout and drop path."""
        rates = [key for key in ("dropout", "attention_dropout", "drop_path") if key in type(self).model_fields]
        return self.model_copy(update=dict.fromkeys(rates, 0.0))

    @abstractmethod
    def build(self, *, image_size: int, channels: int = 3) -> Backbone:
        """The network with fresh weights, on the CPU.

        Raises:
            ConfigError: the settings do not fit together or the image size.
        """
