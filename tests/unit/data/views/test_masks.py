"""Masks: what they are a function of, their shapes, and how often each patch is target or context.

Expected rates come from counting positions, or from published simulations of the released sampler. Seeds
are fixed, so a test passes always or never.
"""

import math
from functools import cache

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from opsin.data.base import Batch
from opsin.data.views.masks import BlockMasks, MaskConfig, PublishedMasks
from opsin.errors import ConfigError

COUNT = 20_000
UNBIASED = MaskConfig()
PUBLISHED = MaskConfig(parity="published")
EVERYTHING = MaskConfig(context_keep=1.0)


@cache
def masks(config: MaskConfig = UNBIASED, side: int = 16, count: int = COUNT) -> dict[str, Tensor]:
    return config.build(side)(7, 3, torch.arange(count))


def flags(patches: Tensor, side: int) -> Tensor:
    """Which patches are named: bool [B, side^2]."""
    named = torch.zeros(len(patches), side**2, dtype=torch.bool)
    return named.scatter_(1, patches.flatten(1), True)


def context_flags(drawn: dict[str, Tensor], side: int) -> Tensor:
    return flags(drawn["context"], side)


def target_flags(drawn: dict[str, Tensor], side: int) -> Tensor:
    return flags(drawn["targets"], side)


def coverage(sizes: list[tuple[int, int]], side: int) -> Tensor:
    """How likely a block of one of these sizes covers each patch, by counting its places: [side^2]."""

    def line(length: int) -> Tensor:
        places = side - length + 1
        return torch.tensor([sum(p <= at < p + length for p in range(places)) / places for at in range(side)]).double()

    rates = {size: line(size[0])[:, None] * line(size[1]) for size in set(sizes)}
    return torch.stack([rates[size] * (sizes.count(size) / len(sizes)) for size in rates]).sum(0).flatten()


def sizes(sampler: BlockMasks | PublishedMasks, block: int) -> list[tuple[int, int]]:
    """The sizes from which a block is drawn evenly; the context is the last block."""
    assert isinstance(sampler, BlockMasks)
    first = int(sampler._first_size[block])
    return [(int(height), int(width)) for height, width in sampler._sizes[first : first + 64**2].tolist()]


def check_rates(named: Tensor, expected: Tensor) -> None:
    # 4.8 standard errors: some of 256 patches exceed them once in two thousand times.
    error = (expected * (1 - expected) / len(named)).sqrt()
    assert ((named.double().mean(0) - expected).abs() <= 4.8 * error + 1e-12).all()


def test_masks_depend_on_seed_epoch_and_image_alone() -> None:
    sampler, ids = MaskConfig().build(16), torch.tensor([5, 900, 3, 77])
    drawn = sampler(1, 2, ids)
    again = MaskConfig().build(16)(1, 2, ids)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    for other in (sampler(2, 2, ids), sampler(1, 3, ids), sampler(1, 2, ids + 1)):
        assert not torch.equal(drawn["targets"], other["targets"])
        assert not torch.equal(drawn["context"], other["context"])


def test_an_image_has_the_same_masks_in_every_batch() -> None:
    whole = masks(count=128)
    sampler, order = MaskConfig().build(16), torch.randperm(128, generator=torch.Generator().manual_seed(0))
    mixed = sampler(7, 3, order)
    for name, mask in whole.items():
        assert torch.equal(mixed[name], mask[order])
        parts = [sampler(7, 3, part)[name] for part in torch.arange(128).split(50)]
        assert torch.equal(torch.cat(parts), mask)


def test_published_masks_depend_on_the_batch_but_not_on_a_random_state() -> None:
    sampler, ids = PUBLISHED.build(16), torch.arange(128)
    torch.manual_seed(1)
    drawn = sampler(1, 2, ids)
    torch.manual_seed(2)
    assert all(torch.equal(drawn[name], mask) for name, mask in sampler(1, 2, ids).items())
    assert drawn["context"].shape[1] < sampler(1, 2, ids[:4])["context"].shape[1]


@pytest.mark.parametrize("config", [MaskConfig(), PUBLISHED, MaskConfig(edges="overhang"), MaskConfig(targets=2)])
@pytest.mark.parametrize("side", [14, 16, 24])
def test_context_and_targets_are_disjoint_patches_of_the_grid(config: MaskConfig, side: int) -> None:
    drawn = masks(config, side, 1000)
    length = drawn["context"].shape[1]
    assert drawn["targets"].shape[:2] == (1000, config.targets)
    assert ("target_valid" in drawn) == (config.parity == "unbiased"), "left out where no block is padded"
    assert drawn.get("target_valid", drawn["targets"]).shape == drawn["targets"].shape
    assert drawn["context"].shape == (1000, length)
    for mask in (drawn["context"], drawn["targets"]):
        assert mask.dtype == torch.int64
        assert mask.min() >= 0
        assert mask.max() < side**2
    assert not (context_flags(drawn, side) & target_flags(drawn, side)).any()
    for context, different in zip(drawn["context"].tolist(), context_flags(drawn, side).sum(1).tolist(), strict=True):
        begin = context[:different]
        assert len(set(begin)) == different, "nothing is repeated before all are named"
        again = config.coarsest**2 * -(-length // different)
        assert context == (begin * again)[:length], "and then from the first on"
    batch = Batch({}, torch.arange(1000), torch.arange(1000), drawn)
    assert torch.equal(torch.cat([part.masks["context"] for part in batch.pieces(3)]), drawn["context"])


def test_a_target_is_a_filled_rectangle_and_its_padding_repeats_a_patch_of_it() -> None:
    for name, config in (("inside", MaskConfig()), ("overhang", MaskConfig(edges="overhang"))):
        drawn = masks(config, 16, 300)
        seen = set()
        for block, valid in zip(drawn["targets"].flatten(0, 1), drawn["target_valid"].flatten(0, 1), strict=True):
            patches = block[valid].tolist()
            rows, columns = sorted({p // 16 for p in patches}), sorted({p % 16 for p in patches})
            assert patches == [row * 16 + column for row in rows for column in columns]
            assert rows == list(range(rows[0], rows[-1] + 1))
            assert columns == list(range(columns[0], columns[-1] + 1))
            assert set(block.tolist()) == set(patches)
            seen.add((len(rows), len(columns)))
        if name == "inside":
            assert seen == set(sizes(config.build(16), 0))
            assert all(0.15 * 256 <= height * width <= 0.2 * 256 for height, width in seen)
            assert drawn["targets"].shape[2] == 49, "no longer than the largest block"
        else:
            assert (1, 1) in seen


def test_targets_differ_in_size_and_shape_within_an_image() -> None:
    drawn = masks()
    areas = drawn["target_valid"].sum(2).double()
    # The correlation of independent draws has a standard deviation of 1 / sqrt(COUNT).
    apart = torch.corrcoef(areas.T) - torch.eye(4)
    assert apart.abs().max() < 4 / math.sqrt(COUNT)
    assert (areas[:, 0] != areas[:, 1]).double().mean() > 0.5


@pytest.mark.parametrize("side", [8, 14, 16])
def test_every_patch_is_target_and_context_as_often_as_even_placement_says(side: int) -> None:
    sampler = EVERYTHING.build(side)
    drawn = masks(EVERYTHING, side)
    outside = (1 - coverage(sizes(sampler, 0), side)) ** 4
    targets, context = target_flags(drawn, side), context_flags(drawn, side)
    check_rates(targets, 1 - outside)
    check_rates(context, outside * coverage(sizes(sampler, 4), side))
    corners = [0, side - 1, side**2 - side, side**2 - 1]
    assert targets.double().mean(0)[corners].min() > 0
    assert context.double().mean(0).min() > 0


def test_blocks_that_overhang_cover_every_patch_equally_often() -> None:
    config = MaskConfig(edges="overhang", context_keep=1.0)
    drawn, blocks = masks(config), sizes(config.build(16), 0)
    # Of the 16 + h - 1 places of a block, h cover a given row.
    rate = sum(h * w / ((15 + h) * (15 + w)) for h, w in blocks) / len(blocks)
    check_rates(target_flags(drawn, 16), torch.full((256,), 1 - (1 - rate) ** 4).double())


@pytest.mark.parametrize("config", [MaskConfig(), MaskConfig(context_keep=0.2)])
def test_a_context_is_thinned_evenly_whatever_the_place(config: MaskConfig) -> None:
    drawn = masks(config)
    length = drawn["context"].shape[1]
    # The same draws place the blocks of both.
    whole, kept = context_flags(masks(EVERYTHING), 16), context_flags(drawn, 16)
    assert not (kept & ~whole).any()
    assert torch.equal(kept.sum(1), whole.sum(1).clamp(max=length))
    share = whole * (length / whole.sum(1, keepdim=True)).clamp(max=1).double()
    error = (share * (1 - share)).sum(0).sqrt()
    assert ((kept.double() - share).sum(0).abs() <= 4.8 * error).all()


def test_contexts_have_one_length_which_nearly_all_images_reach() -> None:
    assert masks()["context"].shape == (COUNT, 85)
    for side in (8, 14, 16):
        drawn = masks(MaskConfig(), side)
        reached = (context_flags(drawn, side).sum(1) == drawn["context"].shape[1]).double().mean()
        assert 0.93 <= reached <= 0.98
    assert masks(MaskConfig(context_keep=0.25), count=4)["context"].shape == (4, 64)


def test_an_image_with_little_context_repeats_its_first_target() -> None:
    config = MaskConfig(min_context=24, context_keep=1.0)
    plain, drawn = masks(EVERYTHING, 8), masks(config, 8)
    before, after = (context_flags(each, 8).sum(1) for each in (plain, drawn))
    short = before < 24
    assert 0.05 < short.double().mean() < 0.3
    assert after.min() == 24
    assert torch.equal(drawn["targets"][short, 3], drawn["targets"][short, 0])
    assert all(torch.equal(mask[~short], plain[name][~short]) for name, mask in drawn.items())


@pytest.mark.parametrize(("side", "coarsest"), [(8, 2), (16, 2), (16, 4), (12, 3), (14, 2)])
def test_a_coarse_cell_is_wholly_target_or_context_or_neither(side: int, coarsest: int) -> None:
    drawn = masks(MaskConfig(coarsest=coarsest), side, 2000)
    for named in (context_flags(drawn, side), target_flags(drawn, side)):
        grid = named.unflatten(1, (side // coarsest, coarsest, side // coarsest, coarsest))
        assert torch.equal(grid.any(4).any(2), grid.all(4).all(2))
    assert not (context_flags(drawn, side) & target_flags(drawn, side)).any()


@pytest.mark.parametrize(("side", "coarsest", "levels"), [(16, 4, (4, 2, 1)), (14, 2, (2, 1)), (12, 3, (3,))])
def test_the_patches_of_a_cell_stand_together_on_every_level(side: int, coarsest: int, levels: tuple[int, ...]) -> None:
    drawn = masks(MaskConfig(coarsest=coarsest), side, 500)
    for level in levels:
        is_valid = drawn["target_valid"].unflatten(-1, (-1, level**2))
        assert torch.equal(is_valid.any(-1), is_valid.all(-1))
        for name, counted in (("context", None), ("targets", is_valid)):
            cells = drawn[name] // side // level * side + drawn[name] % side // level
            runs = cells.unflatten(-1, (-1, level**2))
            same = runs == runs[..., :1]
            assert (same if counted is None else same[counted]).all()


def published_batches(side: int, batch: int, images: int = COUNT) -> list[dict[str, Tensor]]:
    sampler = PUBLISHED.build(side)
    return [sampler(7, epoch, torch.arange(batch)) for epoch in range(images // batch)]


@pytest.mark.parametrize(
    ("side", "batch", "published"), [(16, 128, 67.3), (14, 128, 50.9), (14, 512, 44.2), (14, 16, 58.0)]
)
def test_published_contexts_have_the_published_lengths(side: int, batch: int, published: float) -> None:
    drawn = published_batches(side, batch, 2 * COUNT if batch == 512 else COUNT)
    lengths = torch.tensor([float(masks["context"].shape[1]) for masks in drawn])
    # The published means come from an unknown number of batches, taken for 40 here. A plain program agrees
    # with ours to 0.5: benchmarks/masks.py.
    error = float(lengths.std()) * math.sqrt(1 / len(lengths) + 1 / 40)
    assert abs(float(lengths.mean()) - published) < 3 * error


def test_published_masks_have_the_published_biases() -> None:
    drawn = published_batches(16, 128)
    context = torch.cat([context_flags(masks, 16) for masks in drawn]).unflatten(1, (16, 16))
    targets = torch.cat([target_flags(masks, 16) for masks in drawn]).unflatten(1, (16, 16))
    used = (context | targets).any(0)
    assert int((~used).sum()) == 31
    assert not used[15].any()
    assert not used[:, 15].any()
    rows = context.double().mean((0, 2))
    assert abs(float(rows[0]) - 0.77) < 0.015
    assert abs(float(rows[6:12].mean()) - 0.18) < 0.03
    assert abs(float(rows[13]) - 0.05) < 0.015
    assert rows[15] == 0
    whole = 15 * 15 - targets.flatten(1).sum(1)
    assert abs(float(whole.double().mean()) - 109.6) < 1.5


def test_published_contexts_are_cut_in_raster_order() -> None:
    drawn = PUBLISHED.build(16)(7, 0, torch.arange(128))
    taken, length = target_flags(drawn, 16), drawn["context"].shape[1]
    contexts = [[p for p in range(256) if p // 16 < 15 and p % 16 < 15 and not bool(image[p])] for image in taken]
    assert length == min(map(len, contexts))
    assert drawn["context"].tolist() == [context[:length] for context in contexts]
    assert drawn["targets"].shape[:2] == (128, 4)
    assert all(len(set(block)) == len(block) for block in drawn["targets"].flatten(0, 1).tolist())


def test_published_contexts_give_up_targets_where_too_little_is_left() -> None:
    sampler = MaskConfig(parity="published", min_context=90, target_scale=(0.4, 0.4)).build(16)
    drawn = sampler(7, 0, torch.arange(200))
    context, targets = context_flags(drawn, 16), drawn["targets"]
    assert drawn["context"].shape[1] > 90
    taken = [context.gather(1, targets[:, block]).any(1).double().mean() for block in range(4)]
    assert taken[0] == 0, "the first alone always leaves enough"
    assert 0 < taken[1] < taken[2] < taken[3], "the last goes first"


def test_faults_name_what_would_work() -> None:
    with pytest.raises(
        ConfigError, match=r"coarsest=4 .* 14 x 14 .* gives 12 x 12 or 16 x 16 patches, or one of 1, 2, 7, 14"
    ):
        MaskConfig(coarsest=4).build(14)
    with pytest.raises(ConfigError, match=r"min_context=10: .* 4 x 4 patches, .* may have"):
        MaskConfig(target_scale=(0.5, 0.6)).build(4)
    with pytest.raises(ConfigError, match=r"min_context=10: on a grid of 8 x 8 .* has 9, and it must have more"):
        PUBLISHED.build(8)
    with pytest.raises(ConfigError, match=r"published has no coarsest=2, edges=overhang"):
        MaskConfig(parity="published", coarsest=2, edges="overhang").build(16)
    with pytest.raises(ValidationError, match=r"\[0.2, 1.5\] does not fit; shares of the grid are at most 1"):
        MaskConfig(target_scale=(0.2, 1.5))
