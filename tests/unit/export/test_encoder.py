"""Exported networks are the same networks, in files that say whether they are whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin.data.base import DataFacts
from opsin.errors import CheckpointError, ConfigError, DataError
from opsin.export.encoder import FORMAT, Encoder, describe_encoder, export_encoder, load_export, write_model
from opsin.nn.backbone import Backbone, ModelConfig
from opsin.nn.heads import Classifier
from opsin.nn.timm_backbone import TimmConfig
from opsin.nn.vit import ViTConfig

CLASSES = ("cat", "dog", "horse")
FACTS = DataFacts(CLASSES, 100, 16, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
VIT = ViTConfig(width=24, depth=2, heads=3, patch=4)


def export(folder: Path, config: ModelConfig = VIT, *, with_head: bool = True) -> tuple[Backbone, Classifier]:
    torch.manual_seed(0)
    backbone = config.build(image_size=16, channels=3)
    head = Classifier(backbone.width, len(CLASSES), scale=0.5)
    kept = head if with_head else None
    card = describe_encoder(
        backbone, head=kept, model=config, facts=FACTS, resize=20, method="supervised", recipe="abc"
    )
    export_encoder(folder, card, backbone, kept)
    return backbone.eval(), head.eval()


@pytest.fixture
def pictures() -> Tensor:
    return torch.randint(256, (3, 3, 20, 20), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def normalised(pictures: Tensor) -> Tensor:
    """The centre 16 x 16 pixels of 20 x 20, since no pixel is resized."""
    mean, std = torch.tensor(FACTS.mean).view(3, 1, 1), torch.tensor(FACTS.std).view(3, 1, 1)
    return (pictures[:, :, 2:18, 2:18] / 255 - mean) / std


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    second.load_state_dict(dict(reversed(first.state_dict().items())))
    write_model(tmp_path / "first", first)
    write_model(tmp_path / "second", second)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_shared_and_transposed_weights_come_back(tmp_path: Path) -> None:
    module = nn.Module()
    module.one = nn.Parameter(torch.randn(2, 3).T)
    module.other = module.one
    write_model(tmp_path / "model.safetensors", module)
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["one"], module.one)
    assert torch.equal(state["other"], module.one)


def test_an_exported_encoder_gives_the_features_of_the_network(tmp_path: Path, pictures: Tensor) -> None:
    backbone, head = export(tmp_path)
    encoder = load_export(tmp_path)
    with torch.no_grad():
        tokens = backbone(normalised(pictures))
        probabilities = head(tokens.pooled).softmax(1)
    # Normalising by one multiplication and one addition rounds otherwise: a few float32 units.
    torch.testing.assert_close(encoder(pictures), tokens.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.tokens(pictures).patches, tokens.patches, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.classify(pictures), probabilities, rtol=1e-4, atol=1e-5)
    assert encoder.classes == CLASSES
    assert not encoder(pictures).requires_grad


def test_timm_loads_the_backbone(tmp_path: Path, pictures: Tensor) -> None:
    backbone, _ = export(tmp_path / "vit")
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=0,
        checkpoint_path=str(tmp_path / "vit" / "backbone.safetensors"),
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(normalised(pictures)), backbone(normalised(pictures)).pooled)
    export(tmp_path / "timm", TimmConfig(name="resnet10t"))
    weights = load_file(tmp_path / "timm" / "backbone.safetensors")
    timm.create_model("resnet10t", num_classes=0).load_state_dict(weights)
    assert load_export(tmp_path / "timm")(pictures).shape == (3, 512)


def test_all_kinds_of_images_give_the_same_features(tmp_path: Path, pictures: Tensor) -> None:
    export(tmp_path)
    encoder = load_export(tmp_path)
    expected = encoder(pictures, batch_size=2)
    arrays = [image.permute(1, 2, 0).numpy() for image in pictures]
    assert torch.equal(encoder(pictures / 255), expected)
    assert torch.equal(encoder(arrays), expected)
    assert torch.equal(encoder([Image.fromarray(array) for array in arrays]), expected)


def test_pictures_of_any_size_and_mode_are_taken(tmp_path: Path) -> None:
    export(tmp_path)
    pictures = [Image.new(mode, size) for mode, size in (("L", (40, 30)), ("RGBA", (7, 90)), ("P", (16, 16)))]
    encoder = load_export(tmp_path)
    assert encoder(pictures).shape == (3, 24)
    transparent = encoder.prepare([pictures[1]])
    torch.testing.assert_close(transparent, encoder.prepare([Image.new("RGB", (7, 90), "white")]))


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        (torch.zeros(3, 20, 20), r"shape \[3, 20, 20\]"),
        (torch.zeros(1, 3, 20, 20, dtype=torch.int64), "int64"),
        (torch.full((1, 3, 20, 20), 255.0), "values from 255 to 255"),
        ([np.zeros((20, 20, 3))], "float64"),
        ([Image.new("F", (20, 20))], "mode F"),
        ([], "the list is empty"),
    ],
)
def test_other_images_are_told_what_to_be(tmp_path: Path, images: Tensor, fault: str) -> None:
    export(tmp_path)
    with pytest.raises(DataError, match=fault):
        load_export(tmp_path)(images)


def test_an_encoder_without_a_head_does_not_classify(tmp_path: Path, pictures: Tensor) -> None:
    export(tmp_path, with_head=False)
    assert not (tmp_path / "head.safetensors").exists()
    with pytest.raises(ConfigError, match="no classifier"):
        load_export(tmp_path).classify(pictures)


def changed(folder: Path, **facts: object) -> Encoder:
    path = folder / "encoder.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    return load_export(folder)


def test_a_damaged_export_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_export(tmp_path)
    export(tmp_path)
    with pytest.raises(CheckpointError, match="install a newer opsin"):
        changed(tmp_path, format=FORMAT + 1, unheard_of=True)
    with pytest.raises(CheckpointError, match="image_size"):
        changed(tmp_path, format=FORMAT, unheard_of=None, image_size="large")
    export(tmp_path)
    weights = tmp_path / "backbone.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"backbone\.safetensors: its check sum"):
        load_export(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_export(tmp_path)
