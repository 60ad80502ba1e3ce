"""A small fast convolutional network for small images, after airbench.

Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU" (sections 3.1 to 3.3): a fixed first
layer that whitens patches, three blocks of two or three convolutions, norms that learn an offset only.
Shapes: B images, C channels, S side in pixels, D width of the last block.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from opsin.errors import ConfigError
from opsin.nn.backbone import Backbone, ModelConfig, Tokens

_PATCH = 2
_POOLED = 2**3
_ADDED_VARIANCE = 5e-4

BlockConvs = Literal[2, 3]


class ConvNetConfig(ModelConfig):
    """A fast network for images of about 32 px."""

    name: Literal["convnet"] = "convnet"
    widths: tuple[int, int, int] = (32, 128, 128)
    """Channels of the three blocks; each halves the side of the image."""
    convs: tuple[BlockConvs, BlockConvs, BlockConvs] = (2, 2, 2)
    """Convolutions in each block, 2 or 3; a third one stands beside a shortcut around it and the second."""
    norm_momentum: float = Field(0.4, gt=0, le=1)
    """Share of the newest batch in the running statistics."""

    def build(self, *, image_size: int, channels: int = 3) -> "ConvNet":
        _check_side(image_size)
        if min(self.widths) < 1:
            raise ConfigError(f"model.widths={list(self.widths)}: each must be at least 1")
        return ConvNet(self, image_size, channels)


class ConvNet(Backbone):
    """Whitening, three blocks, and the maximum over the last grid."""

    def __init__(self, config: ConvNetConfig, image_size: int, channels: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.channels = channels
        self.width = config.widths[-1]
        whitened = 2 * channels * _PATCH**2
        self.whiten = nn.Conv2d(channels, whitened, _PATCH, bias=False)
        self.whiten.weight.requires_grad = False
        inputs = (whitened, *config.widths[:-1])
        self.blocks = nn.Sequential(
            *(
                Block(a, b, config.norm_momentum, convs=convs)
                for a, b, convs in zip(inputs, config.widths, config.convs, strict=True)
            )
        )

    def forward(self, images: Tensor) -> Tokens:
        _check_side(images.shape[-1])
        grid = self.blocks(F.gelu(self.whiten(images)))  # [B, D, S/8, S/8]
        return Tokens(pooled=grid.amax((2, 3)), patches=grid.flatten(2).transpose(1, 2))

    def layers(self) -> dict[str, int]:
        """The whitening is layer 0, block i is layer i + 1."""
        return {
            name: int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
            for name, _ in self.named_parameters()
        }

    @torch.no_grad()
    def prepare(self, images: Callable[[], Tensor]) -> None:
        """Set the first layer to the inverse square root of the patches' covariance, and to its negative.

        A layer that came with weights stays: the layers above it were trained on its output.
        """
        if "whiten.weight" in self.loaded:
            return
        filters = _whitening(F.unfold(images().float(), _PATCH).transpose(1, 2).flatten(0, 1))
        filters = filters.reshape(-1, *self.whiten.weight.shape[1:]).to(self.whiten.weight)
        # With both signs the activation loses nothing.
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


class Block(nn.Module):
    """Two or three 3x3 convolutions with norm and activation; the first halves the side."""

    def __init__(self, inputs: int, outputs: int, norm_momentum: float, *, convs: BlockConvs = 2) -> None:
        super().__init__()
        self.conv1 = _filter(inputs, outputs)
        self.norm1 = _norm(outputs, norm_momentum)
        self.conv2 = _filter(outputs, outputs)
        self.norm2 = _norm(outputs, norm_momentum)
        self.has_shortcut = convs == 3
        if self.has_shortcut:
            self.conv3 = _filter(outputs, outputs)
            self.norm3 = _norm(outputs, norm_momentum)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        y = F.gelu(self.norm2(self.conv2(x)))
        return F.gelu(self.norm3(self.conv3(y)) + x) if self.has_shortcut else y


def _check_side(image_size: int) -> None:
    if image_size - _PATCH + 1 < _POOLED:
        raise ConfigError(
            f"image_size {image_size}: model.name=convnet halves the image three times and needs at least "
            f"{_POOLED + _PATCH - 1} pixels; use a larger image_size"
        )


def _whitening(patches: Tensor) -> Tensor:
    """The symmetric filters [C * 4, C * 4], in float64, that whiten `patches` [patches, C * 4].

    Eigenvectors as filters would not be determined: their signs are free, and where eigenvalues are equal (the patches
    of grey images have 8 of 12 that are 0) so are their directions. Each LAPACK chooses others. A function of the
    matrix does not depend on that choice.
    """
    patches = patches.double()
    variance, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    # Directions that the images do not have contain roundings alone, which would be scaled by 45.
    scale = torch.where(variance > _ADDED_VARIANCE / 100, (variance + _ADDED_VARIANCE).rsqrt(), 0)
    filters: Tensor = vectors * scale @ vectors.T
    return filters


def _filter(inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution that starts by passing its inputs through, as far as it has outputs for them."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5))
    nn.init.dirac_(conv.weight[: min(inputs, outputs)].detach())
    return conv


def _norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=momentum)
    norm.weight.requires_grad = False
    return norm
