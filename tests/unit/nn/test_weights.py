"""Weights from files and runs: what fits is loaded, what does not is said."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opsin.errors import CheckpointError, ConfigError
from opsin.nn.timm_backbone import TimmConfig
from opsin.nn.vit import VisionTransformer, ViTConfig
from opsin.nn.weights import initialise, load_weights

State = dict[str, Tensor]


def vit(*, size: int = 16, channels: int = 3, **settings: Any) -> VisionTransformer:
    config = ViTConfig(**{"width": 24, "depth": 2, "heads": 2, "patch": 4, **settings})
    return config.build(image_size=size, channels=channels).eval()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def write_safetensors(folder: Path, state: State) -> Path:
    save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


def write_pt(folder: Path, state: State) -> Path:
    torch.save(state, folder / "w.pt")
    return folder / "w.pt"


def write_wrapped(folder: Path, state: State) -> Path:
    torch.save({"epoch": 3, "model": {"state_dict": prefixed("module.", state)}}, folder / "w.pth")
    return folder / "w.pth"


def write_run(folder: Path, state: State) -> Path:
    head = {"classifier.linear.weight": torch.zeros(3, 24)}
    save_file(prefixed("backbone.", state) | head, folder / "model.safetensors")
    return folder


def write_checkpoint(folder: Path, state: State) -> Path:
    student = {name: value + 1.0 for name, value in state.items()}
    method = prefixed("student.backbone.", student) | prefixed("teacher.backbone.", state)
    torch.save({"method": method, "optimizer": {"state": {}}, "step": 123}, folder / "state.pt")
    return folder


@pytest.mark.parametrize("write", [write_safetensors, write_pt, write_wrapped, write_run, write_checkpoint])
def test_every_kind_of_source_loads(write: Callable[[Path, State], Path], tmp_path: Path) -> None:
    source, target = vit().state_dict(), vit()
    report = load_weights(target, str(write(tmp_path, source)))
    assert same(target.state_dict(), source)
    assert set(report.loaded) == set(source)
    assert len(report.lines()) == 1, report.lines()


def test_the_teacher_is_taken_before_the_student(tmp_path: Path) -> None:
    report = load_weights(vit(), write_checkpoint(tmp_path, vit().state_dict()))
    assert report.prefix == "teacher.backbone."
    assert report.outside == len(report.loaded)


def test_a_run_with_a_timm_network_loads_into_it(tmp_path: Path) -> None:
    config = TimmConfig(name="resnet18", stem="small")
    source, target = (config.build(image_size=16) for _ in range(2))
    save_file(prefixed("backbone.", source.state_dict()), tmp_path / "model.safetensors")
    report = initialise(target, config.model_copy(update={"weights": str(tmp_path)}))
    assert report is not None
    assert not report.missing
    assert same(target.state_dict(), source.state_dict())


def test_timm_weights_load_into_our_vit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    theirs = TimmConfig(name="vit_tiny_patch16_224", options=options).build(image_size=16).network
    ours = vit()
    load_weights(ours, write_pt(tmp_path, theirs.state_dict()))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images).pooled, theirs.eval()(images), rtol=1e-4, atol=1e-5)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    state = vit().state_dict() | {"head.weight": torch.zeros(10, 24)}
    del state["norm.bias"]
    target = vit()
    before = target.norm.bias.clone()
    report = load_weights(target, write_pt(tmp_path, state))
    assert report.missing == ("norm.bias",)
    assert report.unexpected == ("head.weight",)
    assert torch.equal(target.norm.bias, before)
    assert report.lines()[1:] == ["  missing, fresh here: 1 (norm.bias)", "  unexpected, not used: 1 (head.weight)"]


@pytest.mark.parametrize("size", [8, 24])
def test_position_embedding_is_interpolated_to_the_grid(size: int, tmp_path: Path) -> None:
    source, target = vit(), vit(size=size)
    report = load_weights(target, write_pt(tmp_path, source.state_dict()))
    assert report.reshaped == (f"pos_embed [1, 17, 24] -> [1, {size**2 // 16 + 1}, 24]",)
    images = torch.randn(2, 3, size, size)
    # The network interpolates in the same way when it meets another image size.
    assert torch.equal(target(images).pooled, source(images).pooled)


def test_position_embedding_survives_the_loss_of_the_class_token(tmp_path: Path) -> None:
    source, target = vit(), vit(class_token=False, pool="mean")
    report = load_weights(target, write_pt(tmp_path, source.state_dict()))
    assert torch.equal(target.pos_embed, source.pos_embed[:, 1:])
    assert report.unexpected == ("cls_token",)


def test_grey_network_sees_what_the_colour_network_saw(tmp_path: Path) -> None:
    source, target = vit(), vit(channels=1)
    report = load_weights(target, write_pt(tmp_path, source.state_dict()))
    assert report.reshaped == ("patch_embed.proj.weight [24, 3, 4, 4] -> [24, 1, 4, 4]",)
    grey = torch.randn(2, 1, 16, 16)
    # The sum over three channels in another order.
    torch.testing.assert_close(target(grey).pooled, source(grey.expand(-1, 3, -1, -1)).pooled, rtol=1e-4, atol=1e-5)


def test_half_precision_file_fills_a_full_precision_network(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in vit().state_dict().items()}
    target = vit()
    load_weights(target, write_safetensors(tmp_path, state))
    assert target.pos_embed.dtype == torch.float32
    assert torch.equal(target.pos_embed, state["pos_embed"].float())


def test_another_shape_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    target = vit()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    path = write_pt(tmp_path, vit(mlp_ratio=2.0).state_dict())
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1\.weight \[48, 24\] instead of \[96, 24\]"):
        load_weights(target, path)
    assert same(target.state_dict(), before)


def test_another_network_is_refused(tmp_path: Path) -> None:
    path = write_pt(tmp_path, {"conv1.weight": torch.zeros(3), "norm.weight": torch.zeros(24)})
    with pytest.raises(CheckpointError, match=r"has 1 of the 30 tensors .* lacks cls_token, .* has conv1\.weight"):
        load_weights(vit(), path)


def write_text(folder: Path) -> Path:
    path = folder / "w.safetensors"
    path.write_text("not tensors")
    return path


def write_object(folder: Path) -> Path:
    torch.save({"args": argparse.Namespace(lr=1), "model": {}}, folder / "w.pt")
    return folder / "w.pt"


def write_cut(folder: Path) -> Path:
    path = write_pt(folder, vit().state_dict())
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def write_list(folder: Path) -> Path:
    torch.save([1, 2], folder / "w.pt")
    return folder / "w.pt"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: folder / "none.pt", "does not exist; give"),
        (lambda folder: folder, "neither model.safetensors nor state.pt"),
        (write_text, "cannot be read"),
        (write_cut, "cannot be read"),
        (write_object, "more than tensors"),
        (write_list, "no named tensors"),
    ],
)
def test_unusable_sources_are_explained_in_one_line(
    write: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(vit(), write(tmp_path))
    assert "\n" not in str(caught.value)


def test_without_weights_nothing_is_loaded() -> None:
    assert initialise(vit(), ViTConfig()) is None


def test_our_vit_has_no_pretrained_weights() -> None:
    with pytest.raises(ConfigError, match="not model 'vit'; give a file"):
        initialise(vit(), ViTConfig(weights="pretrained"))


def test_pretrained_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = TimmConfig(name="resnet18", weights="pretrained")
    with pytest.raises(ConfigError, match=r"weights of resnet18 could not be fetched .* give a file"):
        initialise(config.build(image_size=32), config)


def test_a_model_without_published_weights_says_so() -> None:
    config = TimmConfig(name="mobilenetv2_035", weights="pretrained")
    with pytest.raises(ConfigError, match=r"mobilenetv2_035 cannot load them .* give a file"):
        initialise(config.build(image_size=32), config)
