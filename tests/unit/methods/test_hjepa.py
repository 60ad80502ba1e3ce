"""H-JEPA against its plain implementation; with one level, against I-JEPA to the last bit."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from opsin.clock.schedule import Constant, Linear, OneCycle
from opsin.data.base import Batch
from opsin.data.views.masks import MaskConfig, PublishedMasks
from opsin.errors import ConfigError
from opsin.methods.hjepa import HJepa, coarser, value_above
from opsin.methods.ijepa import Cells, IJepa, pooled
from opsin.nn.attention import AttentionKind, set_attention
from opsin.nn.vit import ViTConfig
from opsin.training.optim import build_optimizer, schedule_setter
from opsin.training.step import train_step
from tests.plain_hjepa import block_cells, cell_means, cell_positions
from tests.plain_ijepa import gather_tokens, plain_layer_norm
from tests.unit.methods.jepa_parts import (
    FACTS,
    GRID,
    OPTIM,
    VIT,
    PlainRun,
    batch_of,
    build_hjepa,
    gradients,
    hjepa_config,
    ijepa_config,
    plan_for,
    state_of,
)
from tests.unit.methods.plain_steps import BATCH, EPOCHS, STEPS_PER_EPOCH, TIMELINE, distance, everything, same_bits

# As for I-JEPA: float64 but for positions and the share of the target encoder, which are float32 numbers.
CLOSE = 1e-6
HALVES = (1.0, 0.5, 0.25)


def cells_of(batch: Batch, level: int) -> Cells:
    finest = Cells.of(batch.masks)
    return finest if level == 0 else coarser(finest, 2**level, GRID)


def compare_steps(method: HJepa, plain: PlainRun, steps: int, **changes: Any) -> None:
    """See that losses, gradients and weights of some steps are those of plain torch."""
    state, plan = state_of(method), plan_for(method, **changes)
    for step in range(steps):
        batch = batch_of(method, step)
        _, found = gradients(method, batch, step)
        report = train_step(state, batch, plan)
        losses = plain.backward(batch)
        for level, loss in enumerate(losses):
            assert report.values[f"loss/level_{level}"].item() == pytest.approx(loss, rel=CLOSE)
        total = sum(weight * loss for weight, loss in zip(plain.level_weights, losses, strict=True))
        assert report.values["train/loss"].item() == pytest.approx(total, rel=CLOSE)
        expected = {name: param.grad for name, param in plain.trained.items() if param.grad is not None}
        assert found.keys() == expected.keys() == plain.trained.keys()
        far = {name: distance(found[name], grad) for name, grad in expected.items()}
        assert max(far.values()) < CLOSE, far
        plain.update(step)
        far = {name: distance(method.state_dict()[name], value) for name, value in plain.named.items()}
        assert max(far.values()) < CLOSE, far


@pytest.mark.parametrize(
    ("masks", "depths", "accumulate"),
    [
        ("ragged cells", None, 1),
        ("ragged cells", (2, 1, 2), 4),
        ("equal cells", (2, 1, 1), 1),
        ("equal cells", None, 4),
    ],
)
def test_steps_equal_those_of_plain_pytorch(masks: str, depths: tuple[int, ...] | None, accumulate: int) -> None:
    method = build_hjepa(masks, depths=depths)
    plain = PlainRun(method, depths=depths or (2, 2, 2), level_weights=HALVES)
    compare_steps(method, plain, 3, accumulate=accumulate)


def test_each_level_has_a_weight_and_a_schedule_of_its_own() -> None:
    def factor(name: str, step: int) -> float:
        falling = 1 - 0.8 * step / (EPOCHS * STEPS_PER_EPOCH)
        rising = min(1, 0.5 + 0.5 * step / STEPS_PER_EPOCH)
        names = {"predictors.1": falling, "hints.1": falling, "predictors.2": rising}
        return next((value for prefix, value in names.items() if name.startswith(prefix)), 1.0)

    weights = (0.3, 1.0, 2.0)
    schedules = [Constant(), Linear(end=0.2), Constant(warmup_epochs=1, warmup_start=0.5)]
    method = build_hjepa(level_weights=weights, level_schedules=schedules)
    plain = PlainRun(method, depths=(2, 2, 2), level_weights=weights, lr_factor=factor)
    compare_steps(method, plain, TIMELINE.total_steps)


@pytest.mark.parametrize("levels", [1, 2])
def test_steps_equal_those_of_plain_pytorch_with_fewer_levels(levels: int) -> None:
    method = build_hjepa(levels=levels)
    compare_steps(method, PlainRun(method, depths=(2,) * levels, level_weights=HALVES[:levels]), 2)


def test_the_comparison_has_images_with_more_cells_than_others() -> None:
    batch = batch_of(build_hjepa())
    for level in range(3):
        assert len(cells_of(batch, level).valid.sum((1, 2)).unique()) > 1
    assert "target_valid" not in batch_of(build_hjepa("equal cells")).masks


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("masks", ["ragged cells", "equal cells"])
def test_with_one_level_it_is_ijepa_to_the_bit(masks: str, accumulate: int) -> None:
    # In float32 and with dropout, as real runs are.
    model = VIT.model_copy(update={"dropout": 0.1, "drop_path": 0.1})
    methods: list[IJepa] = []
    for config in (ijepa_config(masks), hjepa_config(masks, levels=1)):
        torch.manual_seed(0)
        methods.append(config.build(model, FACTS))
    one, other = methods
    assert one.state_dict().keys() == other.state_dict().keys()
    assert same_bits(list(one.state_dict().values()), list(other.state_dict().values()))
    states = [state_of(method) for method in methods]
    for step in range(4):
        batches = [batch_of(method, step, dtype=torch.float32) for method in methods]
        assert all(torch.equal(mask, batches[1].masks[name]) for name, mask in batches[0].masks.items())
        found = []
        for method, batch in zip(methods, batches, strict=True):
            torch.manual_seed(step)
            found.append(gradients(method, batch, step))
        assert torch.equal(found[0][0].total, found[1][0].total)
        assert torch.equal(found[1][0].total, found[1][0].parts["level_0"])
        assert same_bits(list(found[0][1].values()), list(found[1][1].values()))
        for state, batch in zip(states, batches, strict=True):
            train_step(state, batch, plan_for(state.method, accumulate=accumulate))  # type: ignore[arg-type]  # of ours
        assert same_bits(everything(states[0]), everything(states[1]))


def test_the_same_seed_gives_encoder_and_finest_predictor_of_ijepa() -> None:
    torch.manual_seed(0)
    one = ijepa_config().build(VIT, FACTS).state_dict()
    torch.manual_seed(0)
    three = hjepa_config().build(VIT, FACTS).state_dict()
    assert one.keys() < three.keys()
    assert all(torch.equal(value, three[name]) for name, value in one.items())


def test_cells_are_means_over_neighbours_in_two_dimensions() -> None:
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    places = torch.stack([rows, columns], -1).flatten(0, 1)[None].double()  # [1, N, 2]
    for side in (1, 2, 4):
        centres = torch.arange(0, GRID, side) + (side - 1) / 2
        expected = torch.cartesian_prod(centres, centres).double()[None]
        assert torch.equal(pooled(places, side), expected)


@pytest.mark.parametrize("level", [1, 2])
def test_targets_of_a_level_are_normalised_means_of_its_cells(level: int) -> None:
    method = build_hjepa()
    batch = batch_of(method)
    (raw,) = method.target_tokens(batch.views["image"][0], [VIT.depth])
    cells = cells_of(batch, level)
    expected = plain_layer_norm(cell_means(raw, level, GRID))
    found = method.targets(pooled(raw, 2**level), cells)
    for block in range(cells.indices.shape[1]):
        # float64: the same sums in another order.
        torch.testing.assert_close(
            found[:, block], gather_tokens(expected, cells.indices[:, block]), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("masks", ["ragged cells", "equal cells"])
@pytest.mark.parametrize("level", [1, 2])
def test_cells_of_a_level_are_those_that_the_blocks_fill(level: int, masks: str) -> None:
    method = build_hjepa(masks)
    finest = Cells.of(batch_of(method, size=16).masks)
    targets, valid = finest.indices, finest.valid
    found = coarser(finest, 2**level, GRID)
    plain = block_cells(targets, valid.double(), level, (GRID, GRID))
    assert plain.weights is not None
    for b, t in torch.cartesian_prod(torch.arange(16), torch.arange(2)).tolist():
        own = found.indices[b, t][found.valid[b, t]].tolist()
        assert len(own) == len(set(own))
        assert sorted(own) == plain.indices[b, t][plain.weights[b, t] > 0].tolist()
    # Positions, too, are those of the centres; float32.
    expected = cell_positions(found.indices, level, GRID, 8)
    torch.testing.assert_close(found.positions(GRID, 8), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("padding", ["last", "first"])
@pytest.mark.parametrize("level", [0, 1])
def test_each_cell_hears_what_the_level_above_says_of_its_place(level: int, padding: str) -> None:
    batch = batch_of(build_hjepa(), size=16)
    cells, above = cells_of(batch, level), cells_of(batch, level + 1)
    if padding == "first":
        above = Cells(above.indices.flip(-1), above.valid.flip(-1), above.side)
    across = GRID >> level
    rows_and_columns = torch.stack([above.indices // (across // 2), above.indices % (across // 2)], -1)
    found = value_above(rows_and_columns.where(above.valid[..., None], -1), cells, above, GRID)
    expected = torch.stack([cells.indices // across // 2, cells.indices % across // 2], -1)
    assert torch.equal(found[cells.valid], expected[cells.valid])


@pytest.mark.parametrize("kind", ["fused", "explicit"])
def test_padding_of_blocks_changes_neither_losses_nor_gradients(kind: AttentionKind) -> None:
    method = build_hjepa(depths=(2, 1, 1))
    batch = batch_of(method)
    set_attention(method, kind)
    valid = batch.masks["target_valid"]
    other = torch.randint(GRID**2, valid.shape, generator=torch.Generator().manual_seed(1))
    changed = batch.masks["targets"].where(valid, other)
    assert not torch.equal(changed, batch.masks["targets"])
    losses, grads = gradients(method, batch)
    padded = Batch(batch.views, batch.labels, batch.ids, {**batch.masks, "targets": changed})
    same, same_grads = gradients(method, padded)
    assert torch.equal(losses.total, same.total)
    assert same_bits(list(losses.parts.values()), list(same.parts.values()))
    assert same_bits(list(grads.values()), list(same_grads.values()))


@pytest.mark.parametrize(
    ("level", "reached"),
    [
        (0, {"encoder", "predictors.0", "hints.0", "predictors.1", "hints.1", "predictors.2"}),
        (1, {"encoder", "predictors.1", "hints.1", "predictors.2"}),
        (2, {"encoder", "predictors.2"}),
    ],
)
def test_loss_of_a_level_teaches_itself_and_the_levels_above(level: int, reached: set[str]) -> None:
    method = build_hjepa(depths=(2, 1, 2))
    method(batch_of(method), TIMELINE.clock(0)).parts[f"level_{level}"].backward()
    found = {name for name, param in method.named_parameters() if param.grad is not None and param.grad.any()}
    trained = {name for name, param in method.named_parameters() if param.requires_grad}
    # All of a network or nothing of it.
    assert found == {name for name in trained if name.startswith(tuple(f"{place}." for place in reached))}


def test_total_is_the_weighted_sum_of_the_levels() -> None:
    for weights in (None, (0.0, 1.0, 3.0)):
        method = build_hjepa(level_weights=weights)
        losses = method(batch_of(method), TIMELINE.clock(0))
        assert list(losses.parts) == ["level_0", "level_1", "level_2"]
        expected = sum(w * losses.parts[f"level_{level}"].item() for level, w in enumerate(weights or HALVES))
        assert losses.total.item() == pytest.approx(expected, rel=1e-12)


def test_schedules_of_levels_scale_the_rates_of_their_predictors_and_hints() -> None:
    schedules = [Linear(end=0.5), Constant(), Linear(end=0.0)]
    method = hjepa_config(level_schedules=schedules).build(VIT, FACTS)
    optimizer, set_schedule = build_optimizer(OPTIM, method), schedule_setter(OPTIM, method)
    names = {id(param): name for name, param in method.named_parameters()}
    step = 4
    scheduled = set_schedule(optimizer, TIMELINE.clock(step))
    done = step / TIMELINE.total_steps
    factors = {"predictors.0": 1 - done / 2, "hints.0": 1 - done / 2, "predictors.2": 1 - done}
    seen = set()
    for group in optimizer.param_groups:
        for param in group["params"]:
            name = names[id(param)]
            seen.add(name)
            factor = factors.get(".".join(name.split(".")[:2]), 1.0)
            assert group["lr"] == pytest.approx(scheduled.lr * factor, rel=1e-12), name
    assert seen == {name for name, param in method.named_parameters() if param.requires_grad}


def test_weight_decay_is_for_matrices_and_mask_tokens_alone() -> None:
    method = hjepa_config().build(VIT, FACTS)
    decays = {id(param): group.decay for group in method.param_groups() for param in group.params}
    for name, param in method.named_parameters():
        is_matrix = name.endswith(("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "embed.weight"))
        is_matrix |= name.endswith(("out.weight", "mask_token")) or (name.startswith("hints") and param.ndim == 2)
        expected = is_matrix if param.requires_grad else None
        assert decays.get(id(param)) == expected, name
    assert sum(name.endswith("mask_token") for name, _ in method.named_parameters()) == 3


def test_masks_consist_of_cells_of_the_coarsest_level() -> None:
    method = build_hjepa()
    masks = batch_of(method, size=32).masks
    for name in ("targets", "context"):
        indices = masks[name].flatten(0, -2)
        valid = masks["target_valid"].flatten(0, 1) if name == "targets" else torch.ones_like(indices, dtype=torch.bool)
        for row, real in zip(indices, valid, strict=True):
            patches = set(row[real].tolist())
            cells = {(index // GRID // 4, index % GRID // 4) for index in patches}
            assert len(patches) == 16 * len(cells)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_is_not_a_number_leaves_everything_as_it_was(accumulate: int) -> None:
    method = build_hjepa()
    state, plan = state_of(method), plan_for(method, accumulate=accumulate)
    for step in range(2):
        assert train_step(state, batch_of(method, step), plan).applied == 1
    before, bad = everything(state), batch_of(method, 2)
    bad.views["image"][0, -1, 0, 0, 0] = math.nan
    assert train_step(state, bad, plan).applied == 0
    assert same_bits(everything(state), before)


def test_target_encoder_gets_no_gradient_and_no_place_in_the_optimizer() -> None:
    method = build_hjepa(depths=(2, 1, 1))
    grouped = {id(param) for group in method.param_groups() for param in group.params}
    method(batch_of(method), TIMELINE.clock(0)).total.backward()
    for param in method.backbone.parameters():
        assert param.grad is None
        assert id(param) not in grouped


def test_learns_in_bfloat16() -> None:
    method = build_hjepa().float()
    batch = batch_of(method, dtype=torch.float32)
    exact = copy.deepcopy(method)(batch, TIMELINE.clock(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method(batch, TIMELINE.clock(0))
    losses.total.backward()
    for name, part in losses.parts.items():
        # bfloat16 has three digits.
        assert part.item() == pytest.approx(exact.parts[name].item(), rel=0.03)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


def test_monitors_get_vectors_of_each_level() -> None:
    method = build_hjepa()
    features = method(batch_of(method), TIMELINE.clock(0)).features
    levels = {f"{kind}_{level}": (2 * BATCH, VIT.width) for kind in ("target", "prediction") for level in range(3)}
    assert {name: value.shape for name, value in features.items()} == {"context": (BATCH, VIT.width), **levels}
    assert not any(value.requires_grad for value in features.values())


@pytest.mark.parametrize(
    ("size", "sizes"), [(24, "32 or 48"), (40, "32 or 48"), (8, "32 or 48"), (16, "32 or 48"), (72, "64 or 80")]
)
def test_grid_that_cannot_be_halved_is_refused_with_the_sizes_that_work(size: int, sizes: str) -> None:
    def build(image_size: int) -> None:
        hjepa_config().build(VIT, replace(FACTS, image_size=image_size))

    with pytest.raises(ConfigError, match=rf"method\.levels=3: .* {size // 4} x .* use images of {sizes} px, or f"):
        build(size)
    for good in sizes.split(" or "):
        build(int(good))


def test_predictors_learn_as_the_encoder_does() -> None:
    # With plain momentum beside Muon they lag behind, and what they can predict is little.
    method = hjepa_config(levels=2, predictor_depth=1).build(VIT, FACTS)
    names = {id(param): name for name, param in method.named_parameters()}
    hidden = {names[id(param)] for group in method.param_groups() if group.hidden for param in group.params}
    inside = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = [f"encoder.blocks.{block}" for block in range(VIT.depth)]
    blocks += [f"predictors.{level}.blocks.0" for level in (0, 1)]
    expected = {f"{block}.{layer}.weight" for block in blocks for layer in inside}
    assert hidden == expected | {"predictors.0.out.weight", "predictors.1.out.weight"}


@pytest.mark.parametrize("key", ["level_weights", "depths", "level_schedules"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_lists_need_an_entry_for_each_level(key: str, count: int) -> None:
    lists: dict[str, Any] = {
        "level_weights": (1.0,) * count,
        "depths": (1,) * count,
        "level_schedules": [Constant()] * count,
    }
    with pytest.raises(ConfigError, match=rf"method\.{key}: has {count} entries for method\.levels=3; give one for"):
        hjepa_config(**{key: lists[key]}).build(VIT, FACTS)


@pytest.mark.parametrize("depth", [0, 3])
def test_targets_come_from_blocks_that_there_are(depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"method\.depths: {depth} is not among the 2 blocks"):
        hjepa_config(depths=(2, 1, depth)).build(VIT, FACTS)


def test_schedules_of_levels_move_no_momentum() -> None:
    schedules = [Constant(), OneCycle(momentum=(0.95, 0.85)), OneCycle()]
    with pytest.raises(ConfigError, match=r"method\.level_schedules\.1\.momentum: .* set optim\.schedule\.momentum"):
        hjepa_config(level_schedules=schedules).build(VIT, FACTS)


def test_the_published_masks_are_for_one_level() -> None:
    masks = MaskConfig(parity="published", min_context=4)
    with pytest.raises(ConfigError, match=r"method\.masks\.parity=published: .* use method\.levels=1, or parity=unb"):
        hjepa_config().model_copy(update={"masks": masks}).build(VIT, FACTS)
    one_level = hjepa_config(levels=1).model_copy(update={"masks": masks}).build(VIT, FACTS)
    assert isinstance(one_level.views(32).masks, PublishedMasks)


def test_encoder_with_a_class_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.class_token=true: method\.name=hjepa "):
        hjepa_config().build(ViTConfig(width=12, depth=2, heads=2, patch=4), FACTS)


def test_predictor_needs_a_width_that_heads_and_positions_share() -> None:
    with pytest.raises(ConfigError, match=r"method\.predictor_width=10: .* use 12,"):
        hjepa_config(predictor_width=10).build(VIT, FACTS)
