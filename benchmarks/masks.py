"""Multi-block masks: how often each patch is seen, lengths of contexts, and time per batch.

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/masks.py [--rounds 30] [--images 100000] [--side 16]

The sampler to compare with works as the released one: one image after the other, block after block, in small
tensor operations, and a batch is cut to the shortest. It also checks `parity=published`, by an independent program.
"""

import argparse
import math
import random
from functools import partial
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import default_collate

from interleaved import table, take_turns
from opsin.data.views.masks import BlockMasks, MaskConfig, PublishedMasks

BATCH = 128
SIDES = (8, 14, 16, 24)
PUBLISHED = MaskConfig(parity="published", min_context=8)  # with 10, no target on 8 x 8 is large enough
KINDS = {
    "unbiased": MaskConfig(),
    "unbiased, nothing dropped": MaskConfig(context_keep=1.0),
    "overhang": MaskConfig(edges="overhang"),
    "overhang, blocks of 30-40 %": MaskConfig(edges="overhang", target_scale=(0.3, 0.4)),
    "published": PUBLISHED,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Patches by parity, {arguments.images} images in batches of {BATCH}, {arguments.side} x {arguments.side}")
    for name, config in KINDS.items():
        show_maps(name, config, arguments.side, arguments.images)
    print("\nPatches of a context, mean over batches and its standard error")
    print(table(["grid", "batch", "plain program", "published", "unbiased", "whole", "filled"], length_rows()))
    print(f"\nMilliseconds for the masks of {BATCH} images, one core")
    rows = [timing_row(side, arguments.rounds) for side in SIDES]
    print(table(["grid", "image by image", "published", "unbiased", "speed, published", "speed, unbiased"], rows))


def show_maps(name: str, config: MaskConfig, side: int, images: int) -> None:
    sampler = config.build(side)
    target, context = torch.zeros(side**2), torch.zeros(side**2)
    lengths = torch.zeros(2)
    batches = images // BATCH
    for epoch in range(batches):
        drawn = sampler(0, epoch, torch.arange(BATCH))
        seen = flags(drawn["context"], side)
        target += flags(drawn["targets"], side).sum(0)
        context += seen.sum(0)
        valid = drawn.get("target_valid", torch.ones(1))
        lengths += torch.tensor([seen.sum() / BATCH, valid.float().mean()])
    print(
        f"\n{name}: {lengths[0] / batches:.1f} patches of context, {1 - lengths[1] / batches:.1%} of targets is padding"
    )
    for what, rates in (("target", target), ("context", context)):
        grid = (rates / (batches * BATCH)).view(side, side) * 100
        print(
            f"  {what} in % of images: mean {grid.mean():.1f}, least {grid.min():.2f}, most {grid.max():.1f}, "
            f"corners {grid[0, 0]:.1f} {grid[0, -1]:.1f} {grid[-1, 0]:.1f} {grid[-1, -1]:.1f}, "
            f"never {int((grid == 0).sum())}, deviation {float(grid.std() / grid.mean()):.1%}"
        )
        print("    by row:   ", " ".join(f"{rate:3.0f}" for rate in grid.mean(1)))
        print("    by column:", " ".join(f"{rate:3.0f}" for rate in grid.mean(0)))


def flags(patches: Tensor, side: int) -> Tensor:
    """Which patches are named: bool [B, side^2]."""
    named = torch.zeros(len(patches), side**2, dtype=torch.bool)
    return named.scatter_(1, patches.flatten(1), True)


def length_rows() -> list[list[str]]:
    rows = []
    for side, batch in ((8, 128), (14, 16), (14, 128), (14, 512), (16, 128)):
        batches = max(20_000 // batch, 150)
        plain = [plain_length(side, batch, random.Random(number)) for number in range(batches)]
        sampler = PUBLISHED.build(side)
        ours = [sampler(0, epoch, torch.arange(batch))["context"].shape[1] for epoch in range(batches)]
        whole, kept = (
            MaskConfig(context_keep=keep).build(side)(0, 0, torch.arange(20_000))["context"] for keep in (1.0, "auto")
        )
        length, found = kept.shape[1], flags(whole, side).sum(1).double()
        shown = [f"{length}", f"{found.mean():.1f}", f"{(found < length).double().mean():.1%}"]
        rows.append([f"{side} x {side}", f"{batch}", mean_of(plain), mean_of(ours), *shown])
    return rows


def mean_of(lengths: list[int]) -> str:
    values = torch.tensor(lengths).double()
    return f"{values.mean():.1f} +- {values.std() / math.sqrt(len(values)):.1f}"


def plain_size(side: int, scale: tuple[float, float], ratio: tuple[float, float], draw: float) -> tuple[int, int]:
    area = int(side**2 * (scale[0] + (scale[1] - scale[0]) * draw))
    shape = ratio[0] + (ratio[1] - ratio[0]) * draw
    return min(round(math.sqrt(area * shape)), side - 1), min(round(math.sqrt(area / shape)), side - 1)


def plain_length(side: int, batch: int, chosen: random.Random) -> int:
    """Patches of the shortest context of a batch; a set of patches is the bits of a number."""

    def block(size: tuple[int, int]) -> int:
        top, left = (chosen.randrange(side - length) for length in size)
        return sum((2 ** size[1] - 1) << (row * side + left) for row in range(top, top + size[0]))

    target, context = (
        plain_size(side, PUBLISHED.target_scale, PUBLISHED.target_ratio, chosen.random()),
        plain_size(side, PUBLISHED.context_scale, (1.0, 1.0), chosen.random()),
    )
    shortest = free = side**2
    for _ in range(batch):
        targets = [block(target) for _ in range(PUBLISHED.targets)]
        for attempt in count():
            free = block(context)
            for taken in targets[: max(len(targets) - attempt // 20, 0)]:
                free &= ~taken
            if free.bit_count() > PUBLISHED.min_context:
                break
        shortest = min(shortest, free.bit_count())
    return shortest


def image_by_image(side: int, batch: int, step: int) -> tuple[Tensor, list[Tensor]]:
    """Contexts [B, K] and T targets [B, M] of a batch, as the released sampler goes about it."""
    generator = torch.Generator()
    generator.manual_seed(step)
    draws = [torch.rand(1, generator=generator).item() for _ in range(2)]
    target = plain_size(side, PUBLISHED.target_scale, PUBLISHED.target_ratio, draws[0])
    context = plain_size(side, PUBLISHED.context_scale, (1.0, 1.0), draws[1])

    contexts: list[Tensor] = []
    targets: list[list[Tensor]] = []
    for _ in range(batch):
        blocks, outsides = [], []
        for _ in range(PUBLISHED.targets):
            patches, outside = one_block(side, target, [])
            blocks.append(patches)
            outsides.append(outside)
        contexts.append(one_block(side, context, outsides)[0])
        targets.append(blocks)
    shortest = min(map(len, contexts))
    length = min(len(patches) for blocks in targets for patches in blocks)
    cut = [[patches[:length] for patches in blocks] for blocks in targets]
    return default_collate([patches[:shortest] for patches in contexts]), default_collate(cut)


def one_block(side: int, size: tuple[int, int], allowed: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The patches of a block that lie in all of `allowed` [n, n], and the grid without the block."""
    patches = torch.empty(0)
    for attempt in count():
        # The place stays a tensor, as there.
        top, left = torch.randint(0, side - size[0], (1,)), torch.randint(0, side - size[1], (1,))
        mask = torch.zeros((side, side), dtype=torch.int32)
        mask[top : top + size[0], left : left + size[1]] = 1
        outside = torch.ones((side, side), dtype=torch.int32)
        outside[top : top + size[0], left : left + size[1]] = 0
        for region in allowed[: max(len(allowed) - attempt // 20, 0)]:
            mask *= region
        patches = torch.nonzero(mask.flatten()).squeeze()
        if len(patches) > PUBLISHED.min_context:
            return patches, outside
    raise AssertionError


def timing_row(side: int, rounds: int) -> list[str]:
    ids, steps = torch.arange(BATCH), count()

    def draw(sampler: BlockMasks | PublishedMasks) -> None:
        sampler(0, next(steps), ids)

    slow, published, unbiased = take_turns(
        {
            "image by image": lambda: image_by_image(side, BATCH, next(steps)),
            "published": partial(draw, PUBLISHED.build(side)),
            "unbiased": partial(draw, MaskConfig().build(side)),
        },
        rounds=rounds,
    )
    times = [f"{1e3 * timing.median_s:.2f}" for timing in (slow, published, unbiased)]
    return [f"{side} x {side}", *times, *(f"{timing.speed_over(slow):.1f}x" for timing in (published, unbiased))]


if __name__ == "__main__":
    main()
