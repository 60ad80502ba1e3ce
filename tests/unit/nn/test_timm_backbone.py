"""One small network of each family of timm, as a backbone."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from opsin.errors import ConfigError
from opsin.nn.attention import set_attention
from opsin.nn.timm_backbone import TimmBackbone, TimmConfig

FAMILIES = {
    # name: config, image size, width, width of the grid, patches
    "ResNet": (TimmConfig(name="resnet18", stem="small"), 32, 512, 512, 16),
    "ConvNeXt": (TimmConfig(name="convnext_atto", drop_path=0.1), 64, 320, 320, 4),
    "MobileNet": (TimmConfig(name="mobilenetv3_small_050", dropout=0.1), 64, 1024, 288, 4),
    "ViT": (TimmConfig(name="vit_tiny_patch16_224", options={"patch_size": 4, "depth": 2}), 32, 192, 192, 64),
    "PVT": (TimmConfig(name="pvt_v2_b0"), 64, 256, 256, 4),
    "Swin": (
        TimmConfig(name="swin_tiny_patch4_window7_224", options={"window_size": 2, "embed_dim": 48}),
        64,
        384,
        384,
        4,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_tokens(family: str) -> None:
    config, size, width, patch_width, patches = FAMILIES[family]
    backbone = config.build(image_size=size)
    assert (backbone.width, backbone.patch_width, backbone.image_size) == (width, patch_width, size)
    assert all(layer.training for layer in backbone.modules())
    backbone.eval()
    images = torch.randn(2, 3, size, size)
    tokens = backbone(images)
    assert tokens.pooled.shape == (2, width)
    assert tokens.patches.shape == (2, patches, patch_width)
    torch.testing.assert_close(tokens.pooled, backbone.network(images))


@pytest.mark.parametrize("family", ["ConvNeXt", "Swin"])
def test_patches_are_the_grid_row_by_row(family: str) -> None:
    config, size, *_ = FAMILIES[family]
    backbone = config.build(image_size=size).eval()
    images = torch.randn(1, 3, size, size)
    before = backbone(images).patches
    images[:, :, : size // 2, size // 2 :] += 3.0
    change = (backbone(images).patches - before).norm(dim=-1)[0]
    assert change.argmax() == 1  # upper right of a 2 x 2 grid


def test_grey_images_enter_where_asked() -> None:
    backbone = TimmConfig(name="resnet18", stem="small").build(image_size=16, channels=1)
    assert backbone(torch.randn(2, 1, 16, 16)).pooled.shape == (2, 512)


def test_drop_path_and_dropout_reach_the_network() -> None:
    config = TimmConfig(name="resnet18", drop_path=0.2, dropout=0.4)
    backbone = config.build(image_size=32)
    assert backbone.network.drop_rate == 0.4
    rates: list[Any] = [layer.drop_prob for layer in backbone.modules() if type(layer).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.2)


def test_attention_of_timm_can_be_set() -> None:
    config, size, *_ = FAMILIES["ViT"]
    backbone = config.build(image_size=size).eval()
    images = torch.randn(2, 3, size, size)
    outputs: list[Tensor] = []
    for kind in ("fused", "explicit"):
        assert set_attention(backbone, kind) == 2
        outputs.append(backbone(images).pooled)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def build(size: int = 64, **settings: Any) -> TimmBackbone:
    return TimmConfig(**settings).build(image_size=size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet81"}, r"model\.name = 'resnet81': .* did you mean 'resnet18'\?"),
        ({"name": "resnet18.no_such_tag"}, r"timm cannot build it .*no_such_tag"),
        ({"name": "resnet18", "options": {"depht": 3}}, r"model\.options\.depht: resnet18 does not have this option"),
        ({"name": "vgg11", "drop_path": 0.1}, r"model\.drop_path: vgg11 does not have this option"),
        ({"name": "vit_tiny_patch16_224", "options": {"num_heads": 7}}, r"timm cannot build it .*divisible"),
        ({"name": "vit_tiny_patch16_224", "size": 50}, r"image_size 50 .* patch, 16; use data\.image_size=48"),
        ({"name": "convnext_atto", "size": 8}, r"cannot take images of 8 x 8 pixels .*data\.image_size"),
        ({"name": "convnext_atto", "stem": "small"}, r"model\.stem = 'small': convnext_atto"),
        ({"name": "resnet10t", "stem": "small"}, r"model\.stem = 'small': resnet10t"),
    ],
)
def test_what_cannot_be_built_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(**settings)
    assert "\n" not in str(caught.value)


def test_options_that_opsin_decides_are_refused() -> None:
    with pytest.raises(ValidationError, match="num_classes follows from the method's head"):
        TimmConfig(name="resnet18", options={"num_classes": 10})
