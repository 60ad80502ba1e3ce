"""The last number of each tensor that small networks draw before step 0, in weights.json.

Renew them only where a change of the numbers is meant; old and new then stand in the difference of the file:

    PYTHONPATH=src:. python -m tests.golden.drawn_weights
"""

import json
from pathlib import Path

import torch

from opsin.data.base import DataFacts
from opsin.methods.base import MethodConfig
from opsin.methods.dino import DinoConfig
from opsin.methods.hjepa import HJepaConfig
from opsin.methods.ijepa import IJepaConfig
from opsin.methods.supervised import SupervisedConfig
from opsin.nn.backbone import ModelConfig
from opsin.nn.convnet import ConvNetConfig
from opsin.nn.timm_backbone import TimmConfig
from opsin.nn.vit import ViTConfig

FILE = Path(__file__).with_name("weights.json")
FACTS = DataFacts(tuple("abc"), samples=64, image_size=32, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
# Tensors of fewer than 16 numbers (8 here) are drawn by another function of torch than larger ones.
_VIT = ViTConfig(width=8, depth=1, heads=2, patch=8)
_PATCHES_ONLY = ViTConfig(width=8, depth=1, heads=2, patch=4, class_token=False, pool="mean", position="sincos")
VARIANTS: dict[str, tuple[MethodConfig, ModelConfig]] = {
    "supervised vit": (SupervisedConfig(), _VIT),
    "dino convnet": (DinoConfig(prototypes=6, hidden=8, bottleneck=4), ConvNetConfig(widths=(28, 30, 32))),
    "ijepa vit": (IJepaConfig(predictor_width=8, predictor_depth=1), _PATCHES_ONLY),
    "hjepa vit": (HJepaConfig(predictor_width=8, predictor_depth=1), _PATCHES_ONLY),
    "supervised resnet10t": (SupervisedConfig(), TimmConfig(name="resnet10t", stem="imagenet")),
    # timm draws with a function of its own.
    "supervised vit_tiny_patch16_224": (
        SupervisedConfig(),
        TimmConfig(name="vit_tiny_patch16_224", options={"depth": 1, "embed_dim": 24, "num_heads": 2}),
    ),
}


def drawn_weights(name: str) -> dict[str, float]:
    """The last number of each tensor whose numbers differ from each other, by its name."""
    method, model = VARIANTS[name]
    torch.manual_seed(0)
    network = method.build(model, FACTS)
    drawn = {name: param for name, param in network.state_dict().items() if param.ndim and param.min() < param.max()}
    return {name: float(f"{float(param.flatten()[-1]):.8g}") for name, param in drawn.items()}


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: drawn_weights(name) for name in VARIANTS}, indent=1) + "\n")
