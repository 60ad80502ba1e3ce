"""Networks that a recipe or an export can name: importing this file makes them members of `ModelConfig`."""

from opsin.nn.convnet import ConvNetConfig
from opsin.nn.timm_backbone import TimmConfig
from opsin.nn.vit import ViTConfig

MODELS = (ConvNetConfig, TimmConfig, ViTConfig)
