"""Networks that a recipe or an export can name: importing this file makes them members of `ModelConfig`."""

from typing import Literal

from opsin.errors import ConfigError
from opsin.nn.backbone import Backbone, ModelConfig
from opsin.nn.convnet import ConvNetConfig
from opsin.nn.timm_backbone import TimmConfig
from opsin.nn.vit import ViTConfig


class AutoConfig(ModelConfig):
    """The largest network that the time allows, chosen before a run begins."""

    name: Literal["auto"] = "auto"

    def build(self, *, image_size: int, channels: int = 3) -> Backbone:
        raise ConfigError("model.name=auto: a network is chosen before a run begins; name one here, such as resnet18")


MODELS = (AutoConfig, ConvNetConfig, TimmConfig, ViTConfig)
