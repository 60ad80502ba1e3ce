"""Any network of timm as a backbone.

Functions import timm themselves: it takes seconds, and most commands do not need it.

Shapes: B images, C channels, S side in pixels, h x w the final grid, N = h x w patches, D width.
"""

import difflib
import re
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from opsin.errors import ConfigError
from opsin.nn.backbone import Backbone, ModelConfig, Tokens, first_line

_OWN_KEYS = {"num_classes": "the method's head", "in_chans": "the images", "pretrained": "model.weights=pretrained"}
_KEY_OF_ARGUMENT = {"drop_path_rate": "model.drop_path", "drop_rate": "model.dropout"}


class TimmConfig(ModelConfig):
    """A network of timm, by its name in timm: resnet50, convnext_tiny, vit_small_patch16_224 or any other."""

    name: str = "resnet50"
    """Any name of `timm.list_models()`, also with a tag of pretrained weights."""
    drop_path: float | None = Field(None, ge=0.0, lt=1.0)
    """Probability that an image skips a residual branch of the last block; null takes timm's default."""
    dropout: float | None = Field(None, ge=0.0, lt=1.0)
    """Share of the pooled features that is dropped; null takes timm's default."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """First layers: `small` gives a ResNet a 3 x 3 filter of stride 1 without pooling, for images up to 64 pixels."""
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `patch_size`."""

    @field_validator("options")
    @classmethod
    def _leaves_own_keys(cls, options: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
        for key in options:
            if key in _OWN_KEYS:
                raise ValueError(f"option {key} follows from {_OWN_KEYS[key]}; leave it out")
        return options

    def build(self, *, image_size: int, channels: int = 3) -> "TimmBackbone":
        return TimmBackbone(self, image_size=image_size, channels=channels)


class TimmBackbone(Backbone):
    """A network of timm without its classifier, as `network`.

    `pooled` is the input of the classifier. `patches` is the final grid without class or register
    tokens; its width, `patch_width`, differs from `width` if a layer lies between the two.
    """

    def __init__(self, config: TimmConfig, *, image_size: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.channels = channels
        self.network: Any = _create(config, image_size, channels)
        sample = self._probe()
        self.width = sample.pooled.shape[-1]
        self.patch_width = sample.patches.shape[-1]

    def forward(self, images: Tensor) -> Tokens:
        """Normalised images [B, C, S, S] to features."""
        features = self.network.forward_features(images)
        pooled = self.network.forward_head(features, pre_logits=True)  # [B, D]
        if features.ndim == 3:
            return Tokens(pooled, features[:, getattr(self.network, "num_prefix_tokens", 0) :])
        if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
            return Tokens(pooled, features.flatten(1, 2))
        return Tokens(pooled, features.flatten(2).transpose(1, 2))

    def check_size(self, image_size: int, *, key: str) -> None:
        try:
            super().check_size(image_size, key=key)
        except ConfigError as error:
            hint = "timm's vision transformers accept several with model.options={dynamic_img_size: true}"
            raise ConfigError(*(f"{fault}; {hint}" for fault in error.faults)) from error

    def checkpoint_blocks(self) -> bool:
        """Checkpoint as timm divides the network; False if timm cannot divide it."""
        try:
            self.network.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            return False
        return True

    def layers(self) -> dict[str, int]:
        """Layers as timm groups them for layer-wise learning rates."""
        from timm.models import group_parameters

        found = group_parameters(self.network, self.network.group_matcher(coarse=False), reverse=True)
        return {f"network.{name}": int(layer) for name, layer in found.items()}

    def pretrained_state(self) -> dict[str, Tensor]:
        """The published weights for `network`, fitted to its image size and channels.

        Raises:
            ConfigError: timm has no weights for it, or they cannot be fetched.
        """
        return dict(_create(self.config, self.image_size, self.channels, pretrained=True).state_dict())

    def _probe(self) -> Tokens:
        """Features of one black image: the sizes, and the proof that the network accepts such images."""
        # timm silently ignores pixels that do not fill a patch.
        cut = getattr(getattr(self.network, "patch_embed", None), "proj", None)
        if isinstance(cut, nn.Conv2d) and cut.kernel_size == cut.stride and self.image_size % cut.stride[0]:
            patch = cut.stride[0]
            raise ConfigError(
                f"model.name = {self.config.name!r}: data.image_size {self.image_size} is not a multiple of its "
                f"patch, {patch}; use data.image_size={max(self.image_size // patch, 1) * patch}"
            )
        image = torch.zeros(1, self.channels, self.image_size, self.image_size)
        self.eval()
        try:
            with torch.no_grad():
                tokens = self(image)
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
            raise ConfigError(
                f"model.name = {self.config.name!r}: cannot take images of {self.image_size} x {self.image_size} "
                f"pixels ({first_line(error)}); change data.image_size or model.options"
            ) from error
        finally:
            self.train()
        assert isinstance(tokens, Tokens)
        return tokens


def _create(config: TimmConfig, image_size: int, channels: int, *, pretrained: bool = False) -> nn.Module:
    import timm

    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, [*ModelConfig.members(), *timm.list_models()], n=1)
        way_out = f"did you mean {near[0]!r}?" if near else "timm.list_models() gives all names"
        raise ConfigError(f"model.name = {config.name!r}: unknown to opsin and timm; {way_out}")
    wanted = {"in_chans": channels, "drop_path_rate": config.drop_path, "drop_rate": config.dropout}
    arguments: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
    try:
        published = timm.models.get_pretrained_cfg(config.name, allow_unregistered=True)
        if published is not None and published.fixed_input_size:
            arguments["img_size"] = image_size
        arguments |= config.options
        network: nn.Module = timm.create_model(config.name, pretrained=pretrained, num_classes=0, **arguments)
    except OSError as error:
        raise ConfigError(
            f"model.weights = 'pretrained': the weights of {config.name} could not be fetched "
            f"({first_line(error)}); connect this machine to the network, or give a file"
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise _refusal(config, error, pretrained=pretrained) from error
    if config.stem == "small":
        _use_small_stem(network, config.name)
    return network


def _refusal(config: TimmConfig, error: Exception, *, pretrained: bool) -> ConfigError:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown:
        key = _KEY_OF_ARGUMENT.get(unknown[1], f"model.options.{unknown[1]}")
        return ConfigError(f"{key}: {config.name} does not have this option; leave it out")
    if pretrained:
        return ConfigError(
            f"model.weights = 'pretrained': {config.name} cannot load them ({first_line(error)}); "
            "give a file or another model.name"
        )
    return ConfigError(
        f"model.name = {config.name!r}: timm cannot build it ({first_line(error)}); change its tag or model.options"
    )


def _use_small_stem(network: nn.Module, name: str) -> None:
    from timm.models import ResNet

    if not (isinstance(network, ResNet) and isinstance(network.conv1, nn.Conv2d)):
        raise ConfigError(
            f"model.stem = 'small': {name} does not begin with a ResNet's single filter; "
            "use stem 'imagenet', or a model such as resnet18"
        )
    stem = nn.Conv2d(network.conv1.in_channels, network.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.set_submodule("conv1", stem)
    network.set_submodule("maxpool", nn.Identity())
