"""The vision transformer against timm's, and what it offers beyond it."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from opsin.errors import ConfigError
from opsin.nn.attention import AttentionKind, set_attention, unpack
from opsin.nn.vit import VisionTransformer, ViTConfig
from opsin.nn.weights import load_weights
from tests.plain_ijepa import patch_positions

SMALL: dict[str, Any] = {"width": 48, "depth": 3, "heads": 3, "patch": 4}


def timm_vit(**options: Any) -> Any:
    """timm's network of the same size as `SMALL`, for 16 px; biases and norms away from 0 and 1."""
    import timm

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 0,
    }
    network = timm.create_model("vit_tiny_patch16_224", **sizes, **options)
    for param in network.parameters():
        param.data += 0.1 * torch.randn_like(param)
    return network


def pair(config: ViTConfig, **options: Any) -> tuple[VisionTransformer, Any]:
    theirs = timm_vit(**options)
    ours = config.build(image_size=16)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vit() -> VisionTransformer:
    torch.manual_seed(3)
    return ViTConfig(**SMALL).build(image_size=16).eval()


# Tolerance of the comparisons: the same sums in another order, in float32, over values of size 1.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("kind", ["fused", "explicit"])
def test_equals_timm(images: Tensor, kind: AttentionKind) -> None:
    ours, theirs = pair(ViTConfig(**SMALL))
    assert set_attention(ours, kind) == 3
    tokens = ours(images)
    expected = theirs.forward_features(images)
    torch.testing.assert_close(tokens.pooled, expected[:, 0], **CLOSE)
    torch.testing.assert_close(tokens.patches, expected[:, 1:], **CLOSE)


def test_gradients_equal_timm(images: Tensor) -> None:
    ours, theirs = pair(ViTConfig(**SMALL))
    ours(images).pooled.square().sum().backward()
    theirs(images).square().sum().backward()
    expected = {name: param.grad for name, param in theirs.named_parameters()}
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param.grad, expected[name], rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("class_token", [True, False])
def test_mean_pooling_equals_timm(images: Tensor, class_token: bool) -> None:
    config = ViTConfig(**SMALL, pool="mean", class_token=class_token)
    ours, theirs = pair(config, global_pool="avg", fc_norm=False, class_token=class_token)
    torch.testing.assert_close(ours(images).pooled, theirs(images), **CLOSE)


def test_dropouts_draw_as_timm(images: Tensor) -> None:
    config = ViTConfig(**SMALL, dropout=0.2, attention_dropout=0.1, drop_path=0.3)
    rates = {"pos_drop_rate": 0.2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.1, "drop_path_rate": 0.3}
    ours, theirs = pair(config, **rates)
    set_attention(ours, "explicit")
    set_attention(theirs, "explicit")
    torch.manual_seed(5)
    tokens = ours(images)
    torch.manual_seed(5)
    torch.testing.assert_close(tokens.pooled, theirs(images), **CLOSE)


@pytest.mark.parametrize("size", [8, 24])
def test_other_image_size_equals_timm(size: int) -> None:
    ours, theirs = pair(ViTConfig(**SMALL), dynamic_img_size=True)
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(ours(images).pooled, theirs(images), **CLOSE)


def test_image_need_not_be_square(vit: VisionTransformer) -> None:
    assert vit(torch.randn(1, 3, 8, 12)).patches.shape == (1, 6, 48)


def test_starts_as_timm_does() -> None:
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).state_dict()
    for name, value in ViTConfig(depth=2).build(image_size=32).state_dict().items():
        # The deviation of n draws is known to 1 / sqrt(2 n); six times that never fails by chance.
        allowed = 6 / (2 * value.numel()) ** 0.5
        both = value.std().item(), theirs[name].std().item()
        assert both[0] == pytest.approx(both[1], rel=2 * allowed, abs=1e-8), name


def test_kept_patches_do_not_see_the_others(vit: VisionTransformer, images: Tensor) -> None:
    keep = torch.tensor([[3, 0, 7], [15, 2, 4]])
    before = vit.forward_tokens(images, keep)
    assert before.patches.shape == (2, 3, 48)
    changed = images.clone()
    changed[:, :, 8:12, 4:8] += 1.0  # patch 9, kept in neither image
    after = vit.forward_tokens(changed, keep)
    assert torch.equal(before.patches, after.patches)
    assert torch.equal(before.pooled, after.pooled)


def test_keeping_all_patches_in_another_order_only_reorders(vit: VisionTransformer, images: Tensor) -> None:
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    whole, kept = vit(images), vit.forward_tokens(images, order)
    torch.testing.assert_close(kept.pooled, whole.pooled, **CLOSE)
    torch.testing.assert_close(kept.patches, whole.patches[torch.arange(2)[:, None], order], **CLOSE)


@pytest.mark.parametrize("kind", ["fused", "explicit"])
def test_class_token_only_gives_the_same_class_token(
    vit: VisionTransformer, images: Tensor, kind: AttentionKind
) -> None:
    set_attention(vit, kind)
    tokens = vit.forward_tokens(images, class_token_only=True)
    assert tokens.patches.shape == (2, 0, 48)
    torch.testing.assert_close(tokens.pooled, vit(images).pooled, **CLOSE)


def test_class_token_only_needs_a_pooled_token(images: Tensor) -> None:
    with pytest.raises(ValueError, match="needs pool 'token'"):
        ViTConfig(**SMALL, pool="mean").build(image_size=16).forward_tokens(images, class_token_only=True)


def test_attention_is_what_the_last_block_mixes_with(vit: VisionTransformer, images: Tensor) -> None:
    attention = vit.attention(images)
    assert attention.shape == (2, 3, 17, 17)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 17))
    caught: list[Tensor] = []
    last: Any = vit.blocks[-1].attn
    last.register_forward_hook(lambda layer, inputs, output: caught.extend([inputs[0], output]))
    vit(images)
    values = last.qkv(caught[0])[..., 96:].reshape(2, 17, 3, 16).transpose(1, 2)
    mixed = last.proj((attention @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed, caught[1], **CLOSE)


def test_drop_path_skips_whole_images_and_keeps_the_mean() -> None:
    block: Any = ViTConfig(**SMALL, drop_path=0.5).build(image_size=16).blocks[-1].train()
    out = block._skip(torch.ones(4000, 2, 3))
    assert {tuple(row.unique().tolist()) for row in out} == {(0.0,), (2.0,)}
    # Deviation of the mean of 4000 draws of 0 or 2: 1 / sqrt(4000) = 0.016.
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)


def test_drop_path_skips_whole_images_of_several_sizes_too() -> None:
    block: Any = ViTConfig(**SMALL, drop_path=0.5).build(image_size=16).blocks[-1].train()
    sizes = [(2000, 2), (1000, 3)]
    out = unpack(block._skip(torch.ones(7000, 4), sizes), sizes)
    assert [part.shape for part in out] == [(2000, 2, 4), (1000, 3, 4)]
    for part in out:
        assert {tuple(row.unique().tolist()) for row in part} == {(0.0,), (2.0,)}
        # Deviation of the mean of 1000 such draws: 0.032.
        assert part.mean().item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("kind", ["fused", "explicit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_images_of_several_sizes_are_pooled_as_each_size_alone(
    images: Tensor, pool: str, kind: AttentionKind, *, checkpointing: bool
) -> None:
    vit = ViTConfig(**SMALL, pool=pool).build(image_size=16).double()  # type: ignore[arg-type]  # one of its words
    set_attention(vit, kind)
    if checkpointing:
        vit.checkpoint_blocks()
    sizes = [images.double(), torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.randn(1, 3, 16, 8).double()]
    apart = torch.cat([vit.pool(of_size) for of_size in sizes])
    together = vit.pool_sizes(sizes)
    # The same sums in another order, in float64.
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(apart)
    learned = [param for param in vit.parameters() if param.requires_grad]
    expected = torch.autograd.grad((apart * weights).sum(), learned)
    found = torch.autograd.grad((together * weights).sum(), learned)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.fixture
def fixed() -> VisionTransformer:
    """With fixed positions and without a class token, as the JEPAs want it."""
    torch.manual_seed(3)
    return ViTConfig(**SMALL, class_token=False, pool="mean", position="sincos").build(image_size=16).eval()


@pytest.mark.parametrize("class_token", [True, False])
def test_fixed_positions_are_sines_of_column_and_row(class_token: bool) -> None:
    config = ViTConfig(**SMALL, class_token=class_token, pool="mean", position="sincos")
    vit = config.build(image_size=16)
    # float64, rounded to float32: values of size 1.
    found = vit.pos_embed[0, int(class_token) :]
    torch.testing.assert_close(found, patch_positions(torch.arange(16), 4, 48), rtol=0, atol=1e-7)
    assert not vit.pos_embed[0, : int(class_token)].any()
    assert not vit.pos_embed.requires_grad
    assert [name for name, param in vit.named_parameters() if not param.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize(("height", "width"), [(24, 24), (8, 8), (8, 20)])
def test_fixed_positions_are_computed_for_other_grids(fixed: VisionTransformer, height: int, width: int) -> None:
    images = torch.randn(2, 3, height, width)
    columns = width // 4
    found = fixed._embed(images, None) - fixed.patch_embed(images)
    expected = patch_positions(torch.arange(height // 4 * columns), columns, 48)
    # A sum in float32, from which a term of size 1 is taken again.
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    if height == width:
        other = ViTConfig(**SMALL, class_token=False, pool="mean", position="sincos").build(image_size=height).eval()
        weights = {**fixed.state_dict(), "pos_embed": other.pos_embed}
        other.load_state_dict(weights)
        assert torch.equal(other(images).patches, fixed(images).patches)


def test_fixed_positions_go_with_kept_patches(fixed: VisionTransformer, images: Tensor) -> None:
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    whole, kept = fixed(images), fixed.forward_tokens(images, order)
    torch.testing.assert_close(kept.patches, whole.patches[torch.arange(2)[:, None], order], **CLOSE)


def test_fixed_positions_stay_where_weights_for_another_grid_are_loaded(
    fixed: VisionTransformer, tmp_path: Path
) -> None:
    torch.save(fixed.state_dict(), tmp_path / "weights.pt")
    other = ViTConfig(**SMALL, class_token=False, pool="mean", position="sincos").build(image_size=24)
    load_weights(other, tmp_path / "weights.pt")
    torch.testing.assert_close(other.pos_embed[0], patch_positions(torch.arange(36), 6, 48), rtol=0, atol=1e-7)


def test_learned_positions_learn_as_before(vit: VisionTransformer, images: Tensor) -> None:
    assert all(param.requires_grad for param in vit.parameters())
    # The deviation of n draws is known to 1 / sqrt(2 n); six times that never fails by chance.
    allowed = 6 / (2 * vit.pos_embed.numel()) ** 0.5
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=allowed)
    vit(images).pooled.square().sum().backward()
    assert vit.pos_embed.grad is not None
    assert vit.pos_embed.grad.any(-1).all()


@pytest.mark.parametrize("class_token", [True, False])
def test_depths_give_the_tokens_that_so_many_blocks_leave(images: Tensor, class_token: bool) -> None:
    vit = ViTConfig(**SMALL, class_token=class_token, pool="mean").build(image_size=16).eval()
    caught: dict[int, Tensor] = {}
    for index, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda layer, inputs, output, depth=index + 1: caught.update({depth: output}))
    tokens = vit(images)
    expected = {depth: value[:, int(class_token) :] for depth, value in caught.items()}
    expected[3] = tokens.patches  # after all blocks with the final norm, as everywhere
    for depths in ([3], [1], [1, 2, 3], [3, 1], [2, 2]):
        found = vit.forward_depths(images, depths)
        assert len(found) == len(depths)
        assert all(torch.equal(value, expected[depth]) for value, depth in zip(found, depths, strict=True))
    # Blocks after the last one that is asked for cost nothing.
    caught.clear()
    vit.forward_depths(images, [2, 1])
    assert sorted(caught) == [1, 2]


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_features_of_several_blocks_are_those_after_each_with_the_last_norm(
    images: Tensor, pool: Literal["token", "mean"], blocks: int
) -> None:
    ours, theirs = pair(ViTConfig(**SMALL, pool=pool))
    pooled = ours.eval().pool_blocks(images, blocks)
    after_each = theirs.eval().get_intermediate_layers(images, n=blocks, norm=True, return_prefix_tokens=True)
    expected = [prefix[:, 0] if pool == "token" else patches.mean(dim=1) for patches, prefix in after_each]
    assert pooled.shape == (2, blocks * 48)
    torch.testing.assert_close(pooled, torch.cat(expected, dim=1), **CLOSE)
    assert torch.equal(pooled[:, -48:], ours(images).pooled)


def test_learns_in_bfloat16(vit: VisionTransformer, images: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vit(images[:, :, :8, :8]).pooled.float().square().mean().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in vit.parameters())


def test_image_size_must_be_a_multiple_of_the_patch(vit: VisionTransformer) -> None:
    with pytest.raises(ConfigError, match=r"model\.patch = 4: data\.image_size 30 .* use data\.image_size=28 "):
        ViTConfig(**SMALL).build(image_size=30)
    with pytest.raises(ConfigError, match="30 x 16 pixels"):
        vit(torch.zeros(1, 3, 30, 16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, "width 100 is not a multiple of heads 3; use width 102"),
        ({"class_token": False}, "needs class_token true"),
        ({"width": 54, "position": "sincos"}, "'sincos' needs a width that is a multiple of 4, not 54"),
        ({"dropout": 1.0}, "less than 1"),
        ({"depth": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViTConfig(**settings)


def test_importing_it_loads_neither_timm_nor_torchvision() -> None:
    code = "import sys, opsin.nn.vit; sys.exit(bool({'timm', 'torchvision'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
