"""I-JEPA against its plain implementation, and what context, targets and target encoder must and must not do."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch
from opsin.errors import ConfigError
from opsin.methods.ijepa import Cells, IJepa, IJepaConfig
from opsin.nn.attention import AttentionKind, set_attention
from opsin.nn.timm_backbone import TimmConfig
from opsin.nn.vit import ViTConfig
from opsin.training.optim import AdamW, build_optimizer, schedule_setter
from opsin.training.step import train_step
from tests.plain_ijepa import gather_tokens, plain_layer_norm
from tests.unit.methods.jepa_parts import (
    FACTS,
    GRID,
    MOMENTUM,
    OPTIM,
    VIT,
    PlainRun,
    batch_of,
    build_ijepa,
    gradients,
    hjepa_config,
    ijepa_config,
    plan_for,
    state_of,
)
from tests.unit.methods.plain_steps import BATCH, TIMELINE, distance, everything, same_bits

# All is float64, save that positions are float32 numbers (6e-8 of their size, which another order of the products
# may round otherwise) and so is the share by which the target encoder moves. A millionth leaves room for some.
CLOSE = 1e-6


def cells_of(batch: Batch) -> Cells:
    return Cells.of(batch.masks)


def with_images(batch: Batch, images: Tensor) -> Batch:
    return Batch({"image": images[None]}, batch.labels, batch.ids, batch.masks)


def outside_context(batch: Batch) -> Tensor:
    """bool [B, 1, S, S]: the pixels of patches that are in no context."""
    hidden = torch.ones(len(batch), GRID**2, dtype=torch.bool)
    hidden.scatter_(1, batch.masks["context"], False)
    return hidden.view(-1, 1, GRID, GRID).repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("masks", ["ragged", "equal"])
def test_steps_equal_those_of_plain_pytorch(masks: str, accumulate: int) -> None:
    method = build_ijepa(masks)
    plain, state, plan = PlainRun(method), state_of(method), plan_for(method, accumulate=accumulate)
    for step in range(TIMELINE.total_steps):
        batch = batch_of(method, step)
        _, found = gradients(method, batch, step)
        report = train_step(state, batch, plan)
        (loss,) = plain.backward(batch)
        assert report.values["train/loss"].item() == pytest.approx(loss, rel=CLOSE)
        expected = {name: param.grad for name, param in plain.trained.items()}
        assert found.keys() == expected.keys()
        far = {name: distance(found[name], grad) for name, grad in expected.items() if grad is not None}
        assert len(far) == len(expected)
        assert max(far.values()) < CLOSE, far
        plain.update(step)
        far = {name: distance(method.state_dict()[name], value) for name, value in plain.named.items()}
        assert max(far.values()) < CLOSE, far


def test_the_comparison_has_padded_blocks_repeated_patches_and_both_halves_of_the_loss() -> None:
    context = batch_of(build_ijepa()).masks["context"]
    repeats = [len(set(patches)) < len(patches) for patches in context.tolist()]
    assert any(repeats)
    assert not all(repeats)
    assert len(batch_of(build_ijepa("ragged")).masks["target_valid"].sum((1, 2)).unique()) > 1
    assert "target_valid" not in batch_of(build_ijepa("equal")).masks
    method, batch = build_ijepa(), batch_of(build_ijepa())
    features = method(batch, TIMELINE.clock(0)).features
    apart = features["prediction"] - F.layer_norm(features["target"], (VIT.width,))
    assert 0.05 < (apart.abs() < 1).float().mean() < 0.95


def test_what_is_not_in_the_context_has_no_influence_on_it() -> None:
    method, batch = build_ijepa(), batch_of(build_ijepa())
    images, kept = batch.views["image"][0], batch.masks["context"]
    changed = images.masked_fill(outside_context(batch), math.nan)
    assert changed.isnan().any()
    assert torch.equal(method.encode_context(images, kept), method.encode_context(changed, kept))
    # The same patches, as those of a whole image that go in alone.
    sizes: list[torch.Size] = []
    block = method.encoder.get_submodule("blocks.0")
    block.register_forward_pre_hook(lambda layer, inputs: sizes.append(inputs[0].shape))
    method.encode_context(images, kept)
    assert sizes == [(BATCH, kept.shape[1], VIT.width)]


@pytest.mark.parametrize("kind", ["fused", "explicit"])
def test_padding_of_blocks_changes_neither_loss_nor_gradients(kind: AttentionKind) -> None:
    method, batch = build_ijepa(), batch_of(build_ijepa())
    set_attention(method, kind)
    valid = batch.masks["target_valid"]
    assert not valid.all()
    other = torch.randint(GRID**2, valid.shape, generator=torch.Generator().manual_seed(1))
    padded = Batch(batch.views, batch.labels, batch.ids, {**batch.masks})
    padded.masks["targets"] = batch.masks["targets"].where(valid, other)  # type: ignore[index]  # a dict of ours
    assert not torch.equal(padded.masks["targets"], batch.masks["targets"])
    losses, grads = gradients(method, batch)
    same, same_grads = gradients(method, padded)
    assert torch.equal(losses.total, same.total)
    assert same_bits(list(grads.values()), list(same_grads.values()))


def test_normalised_targets_are_the_gathered_tokens_of_the_whole_image() -> None:
    method, batch = build_ijepa(), batch_of(build_ijepa())
    images, cells = batch.views["image"][0], cells_of(batch)
    (raw,) = method.target_tokens(images, [VIT.depth])
    assert torch.equal(raw, method.encode(images).patches)
    found = method.targets(raw, cells)
    for block in range(cells.indices.shape[1]):
        after = gather_tokens(plain_layer_norm(raw), cells.indices[:, block])
        before = plain_layer_norm(gather_tokens(raw, cells.indices[:, block]))
        for expected in (after, before):
            torch.testing.assert_close(found[:, block], expected, rtol=1e-12, atol=1e-12)  # float64


def test_targets_may_stay_as_they_are() -> None:
    method, batch = build_ijepa(norm_targets=False), batch_of(build_ijepa())
    (raw,) = method.target_tokens(batch.views["image"][0], [VIT.depth])
    found = method.targets(raw, cells_of(batch))
    for block in range(found.shape[1]):
        assert torch.equal(found[:, block], gather_tokens(raw, batch.masks["targets"][:, block]))


def test_targets_see_the_context_too() -> None:
    method, batch = build_ijepa(), batch_of(build_ijepa())
    images, cells = batch.views["image"][0], cells_of(batch)
    place = int(batch.masks["context"][0, 0])
    changed = images.clone()
    changed[0, 0, 4 * (place // GRID), 4 * (place % GRID)] += 1
    assert not (cells.indices[0] == place).any()
    before, after = (method.targets(method.target_tokens(x, [VIT.depth])[0], cells) for x in (images, changed))
    assert (before[0] != after[0]).any(-1).all()
    assert torch.equal(before[1:], after[1:])


def test_target_encoder_gets_no_gradient_and_no_place_in_the_optimizer() -> None:
    method = build_ijepa()
    state = state_of(method)
    losses = method(batch_of(method), TIMELINE.clock(0))
    losses.total.backward()
    grouped = {id(param) for group in state.optimizer.param_groups for param in group["params"]}
    for param in method.backbone.parameters():
        assert param.grad is None
        assert not param.requires_grad
        assert id(param) not in grouped
    for network in (method.encoder, method.predictors):
        assert all(id(p) in grouped for name, p in network.named_parameters() if name != "pos_embed")
    assert not any(value.requires_grad for value in losses.features.values())


def test_both_encoders_start_alike_also_from_loaded_weights() -> None:
    method = ijepa_config().build(VIT, FACTS)
    assert isinstance(method, IJepa)
    assert same_bits(list(method.encoder.state_dict().values()), list(method.backbone.state_dict().values()))
    loaded = copy.deepcopy(build_ijepa().float().backbone.state_dict())
    assert not same_bits(list(loaded.values()), list(method.backbone.state_dict().values()))
    method.backbone.load_state_dict(loaded)
    method.prepare(lambda: pytest.fail("I-JEPA needs no images to start"))
    for network in (method.encoder, method.backbone):
        assert same_bits(list(network.state_dict().values()), list(loaded.values()))
    assert not any(param.requires_grad for param in method.backbone.parameters())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_target_encoder_follows_once_in_an_update_the_weights_that_came_out(accumulate: int) -> None:
    method = build_ijepa()
    before = copy.deepcopy(method)
    train_step(state_of(method), batch_of(method), plan_for(method, accumulate=accumulate))
    kept = MOMENTUM ** (BATCH / 4)
    for name, new in method.encoder.named_parameters():
        old = before.backbone.get_parameter(name)
        if name != "pos_embed":
            assert not torch.equal(new, before.encoder.get_parameter(name))
        # The share is a float32 number.
        assert distance(method.backbone.get_parameter(name), kept * old + (1 - kept) * new) < CLOSE, name


def test_momentum_rises_as_its_shape_says_and_counts_images() -> None:
    def momentum(step: int, size: int = 8, **settings: Any) -> float:
        clock = Timeline([Stage(3, size, 10)]).clock(step)
        return build_ijepa(momentum=0.9, momentum_batch_size=8, **settings).target_momentum(clock)

    for step in (0, 11, 29):
        assert momentum(step) == pytest.approx(0.9 + 0.1 * step / 30)
        rise = 1 - 0.1 * (1 + math.cos(math.pi * step / 30)) / 2
        assert momentum(step, momentum_shape="cosine") == pytest.approx(rise)
        for shape in ("linear", "cosine"):
            # Two halves of a batch keep as much as the whole.
            assert momentum(step, 4, momentum_shape=shape) ** 2 == pytest.approx(momentum(step, momentum_shape=shape))
            assert momentum(step, 16, momentum_shape=shape) == pytest.approx(momentum(step, momentum_shape=shape) ** 2)
    assert [momentum(step, momentum_warmup=True) for step in (0, 1, 5)] == pytest.approx([1 / 10, 2 / 11, 6 / 15])
    assert momentum(29, momentum_warmup=True) == pytest.approx(30 / 39)
    clock = Timeline([Stage(30, 8, 10)]).clock(250)
    late = build_ijepa(momentum=0.9, momentum_batch_size=8, momentum_warmup=True).target_momentum(clock)
    assert late == pytest.approx(251 / 260)
    early = build_ijepa(momentum=0.5, momentum_batch_size=8, momentum_warmup=True).target_momentum(clock)
    assert early == pytest.approx(0.5 + 0.5 * 250 / 300)


@pytest.mark.parametrize("position", ["sincos", "learned"])
def test_weight_decay_is_for_matrices_and_the_mask_token_alone(position: str) -> None:
    model = VIT.model_copy(update={"depth": 1, "position": position})
    method = ijepa_config(predictor_depth=1).build(model, FACTS)
    optimizer = build_optimizer(OPTIM, method)
    schedule_setter(OPTIM, method)(optimizer, TIMELINE.clock(1))
    names = {id(param): name for name, param in method.named_parameters()}
    decay: dict[str, float] = {
        names[id(param)]: group["weight_decay"] for group in optimizer.param_groups for param in group["params"]
    }
    inside = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    encoder = ["patch_embed.proj", *(f"blocks.0.{layer}" for layer in inside)]
    predictor = ["embed", "out", *(f"blocks.0.{layer}" for layer in inside)]
    layers = [*(f"encoder.{layer}" for layer in encoder), *(f"predictors.0.{layer}" for layer in predictor)]
    norms = [f"{place}.{norm}" for place in ("encoder", "predictors.0") for norm in ("norm", "blocks.0.norm1")]
    norms += [f"{place}.blocks.0.norm2" for place in ("encoder", "predictors.0")]
    decayed = {f"{layer}.weight" for layer in layers} | {"predictors.0.mask_token"}
    decayed |= {"encoder.pos_embed"} if position == "learned" else set()
    spared = {f"{layer}.bias" for layer in layers} | {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}
    assert {name for name, value in decay.items() if value > 0} == decayed
    assert {name for name, value in decay.items() if value == 0} == spared


def test_fixed_positions_never_move() -> None:
    method = build_ijepa()
    places = {name: param.clone() for name, param in method.named_parameters() if "pos_embed" in name}
    assert set(places) == {"encoder.pos_embed", "backbone.pos_embed"}
    state, plan = state_of(method, AdamW(lr=0.1, weight_decay=0.5)), plan_for(method, AdamW(lr=0.1, weight_decay=0.5))
    for step in range(2):
        train_step(state, batch_of(method, step), plan)
    for name, value in places.items():
        assert torch.equal(method.get_parameter(name), value)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_is_not_a_number_leaves_everything_as_it_was(accumulate: int) -> None:
    method = build_ijepa()
    state, plan = state_of(method), plan_for(method, accumulate=accumulate)
    for step in range(2):
        assert train_step(state, batch_of(method, step), plan).applied == 1
    before, bad = everything(state), batch_of(method, 2)
    place = int(bad.masks["context"][-1, 0])
    bad.views["image"][0, -1, 0, 4 * (place // GRID), 4 * (place % GRID)] = math.nan
    assert train_step(state, bad, plan).applied == 0
    assert same_bits(everything(state), before)


def test_learns_in_bfloat16() -> None:
    method = build_ijepa().float()
    batch = batch_of(method, dtype=torch.float32)
    exact, _ = gradients(method, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method(batch, TIMELINE.clock(0))
    losses.total.backward()
    # bfloat16 has three digits.
    assert losses.total.item() == pytest.approx(exact.total.item(), rel=0.03)
    assert losses.total.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", [ijepa_config(), hjepa_config()], ids=lambda config: str(config.name))
def test_the_target_encoder_is_at_rest_where_the_encoder_drops(config: IJepaConfig) -> None:
    torch.manual_seed(0)
    method = config.build(VIT.model_copy(update={"dropout": 0.3, "attention_dropout": 0.3, "drop_path": 0.3}), FACTS)
    method.train()
    first, second = (method(batch_of(method, dtype=torch.float32), TIMELINE.clock(0)).features for _ in range(2))
    assert not torch.equal(first["context"], second["context"])
    targets = [name for name in first if name.startswith("target")]
    assert targets
    assert all(torch.equal(first[name], second[name]) for name in targets)


def test_view_is_a_crop_and_blocks_of_single_patches() -> None:
    views = build_ijepa().views(32)
    assert set(views.crops) == {"image"}
    assert not views.augment
    assert views.crops["image"].size == 32
    masks = batch_of(build_ijepa()).masks
    assert set(masks) == {"context", "targets", "target_valid"}
    for context, blocks in zip(masks["context"], masks["targets"], strict=True):
        assert not set(context.tolist()) & set(blocks.flatten().tolist())


def test_monitors_get_one_vector_of_an_image_and_one_of_each_block() -> None:
    method, batch = build_ijepa(), batch_of(build_ijepa())
    features = method(batch, TIMELINE.clock(0)).features
    blocks = batch.masks["targets"].shape[1]
    assert {name: value.shape for name, value in features.items()} == {
        "context": (BATCH, VIT.width),
        "target": (BATCH * blocks, VIT.width),
        "prediction": (BATCH * blocks, VIT.width),
    }
    raw = method.encode(batch.views["image"][0]).patches
    expected = torch.stack([gather_tokens(raw, batch.masks["targets"][:, t])[:, 0] for t in range(blocks)], 1)
    assert torch.equal(features["target"], expected.flatten(0, 1).float())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            TimmConfig(name="resnet18", stem="small"),
            "which only vit supports; use model.name=vit model.class_token=fals",
        ),
        (ViTConfig(width=12, depth=1, heads=2, patch=4), r"model\.class_token=true: .* use .*model\.class_token=false"),
    ],
    ids=["not a vit", "class token"],
)
def test_encoders_that_cannot_leave_out_patches_are_refused(model: ViTConfig | TimmConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ijepa_config().build(model, FACTS)


@pytest.mark.parametrize(
    ("settings", "way_out"),
    [
        ({"predictor_width": 10}, 12),
        ({"predictor_width": 12, "predictor_heads": 8}, 16),
        ({"predictor_width": 6, "predictor_heads": 3}, 12),
    ],
)
def test_predictor_needs_a_width_that_heads_and_positions_share(settings: dict[str, Any], way_out: int) -> None:
    with pytest.raises(ConfigError, match=rf"method\.predictor_width={settings['predictor_width']}: .* use {way_out},"):
        ijepa_config(**settings).build(VIT, FACTS)
    ijepa_config(**{**settings, "predictor_width": way_out}).build(VIT, FACTS)


@pytest.mark.parametrize("width", [0, -8])
def test_predictor_needs_a_positive_width(width: int) -> None:
    with pytest.raises((ConfigError, ValidationError)):
        ijepa_config(predictor_width=width).build(VIT, FACTS)


@pytest.mark.parametrize(
    ("width", "heads", "expected"),
    [
        (1280, 16, 384),  # ViT-Huge, as published
        (192, 3, 96),
        (384, 6, 192),
        (100, 5, 40),  # 50 is no multiple of 4 and 5
        (8, 1, 4),
        (4, 1, 4),
    ],
)
def test_auto_is_half_the_width_of_the_encoder_as_far_as_heads_and_positions_share_it(
    width: int, heads: int, expected: int
) -> None:
    model = VIT.model_copy(update={"width": width, "heads": heads, "depth": 1})
    assert build_ijepa(predictor_width="auto").predictor_width(model) == expected


def test_predictor_has_the_heads_of_the_encoder_unless_told_otherwise() -> None:
    def heads(**settings: Any) -> int:
        method = ijepa_config(**settings).build(VIT, FACTS)
        return int(method.get_submodule("predictors.0.blocks.0.attn").heads)  # type: ignore[arg-type]  # of Attention

    assert heads() == VIT.heads
    assert heads(predictor_heads=4) == 4
