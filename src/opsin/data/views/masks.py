"""Multi-block masks: which patches a network sees of an image, and which blocks of it it predicts.

Assran et al. 2023 (I-JEPA), section 3. Masks are a function of (seed, epoch, image): whatever the batch
around an image, the number of processes or a resume, it gets the same ones. Like boxes of crops they are
computed on the CPU wherever the images are.

Blocks are drawn on a grid of cells; a cell is one patch, or `coarsest` x `coarsest` of them for methods
that predict on several grids. So a cell of the coarsest grid, and with it every cell of a finer one, is
wholly context, wholly target or wholly neither.

Shapes: B images, T targets of an image, n cells a side of the grid, N = n x n cells.
"""

import math
from functools import cache
from typing import Annotated, Literal, NamedTuple, get_args

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from opsin.clock import seeding
from opsin.errors import ConfigError
from opsin.settings.family import Range, Settings

_STEPS = 64  # areas, and also shapes, in a table of sizes
_USUALLY = 0.95  # the share of images that have as many context patches as `context_keep=auto` asks for
_Kind = Literal["target", "context"]
_KINDS: tuple[_Kind, ...] = get_args(_Kind)
_TRIES = 20  # of the published sampler, before it gives up a condition


def _check_shares(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[1] > 1:
        raise ValueError(f"[{bounds[0]:g}, {bounds[1]:g}] does not fit; shares of the grid are at most 1")
    return bounds


ShareRange = Annotated[Range, AfterValidator(_check_shares)]


class MaskConfig(Settings):
    """The blocks to predict, and the context for their prediction."""

    targets: int = Field(4, ge=1)
    """Number of target blocks, which are predicted, of each image."""
    target_scale: ShareRange = (0.15, 0.2)
    """Range of the share of the grid that a target block covers."""
    target_ratio: Range = (0.75, 1.5)
    """Range of the height over the width of a target block, drawn evenly on a logarithmic scale."""
    context_scale: ShareRange = (0.85, 1.0)
    """Range of the share of the grid that the context block covers, before the targets are taken out of it."""
    context_ratio: Range = (1.0, 1.0)
    """Range of the height over the width of the context block."""
    context_keep: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Share of the grid that every context has. Larger contexts are cut at random, smaller ones padded by repetition.

    `auto` takes the share that 95 % of the images reach; 1 cuts nothing."""
    min_context: int = Field(10, ge=1)
    """Smallest number of different patches in a context; where fewer are left, the last targets repeat the first."""
    edges: Literal["inside", "overhang"] = "inside"
    """Border of target blocks: `inside` keeps them within the grid, `overhang` cuts off what reaches over its border.

    Inside, patches near the border are targets less often; with `overhang` all are equally often, in smaller blocks."""
    coarsest: int = Field(1, ge=1)
    """Side of the cells that blocks consist of, in patches; 2^(L-1) for L nested grids."""
    parity: Literal["unbiased", "published"] = "unbiased"
    """Sampler of the blocks; `published` is the released one, without blocks in the last row and column."""

    def build(self, side: int) -> "BlockMasks | PublishedMasks":
        """The sampler for a grid of `side` x `side` patches.

        Raises:
            ConfigError: blocks cannot be drawn on that grid.
        """
        return BlockMasks(self, side) if self.parity == "unbiased" else PublishedMasks(self, side)


class BlockMasks:
    """Blocks of random size and position for each image, without preference for any.

    Called, it gives for the images `ids`, in patch numbers by rows, int64:

    context         [B, K]     patches of the context block outside all targets; K is the same for every batch
    targets         [B, T, M]  patches of each target block, M those of the largest
    target_valid    bool, as `targets`: false where the block's last patch is repeated to reach M; absent if none is

    A context with more than K patches is thinned evenly at random, whatever their position; one with fewer repeats the
    first of them. The patches of a cell stand together, quarter by quarter: any `level` x `level` group, where level
    divides `coarsest` by a power of two, is a run of level^2 entries. Contexts are in random order of cells.

    In plain words, for one image: draw T target sizes and a context size from `_sizes`; put each evenly over the
    positions where it fits; keep the context's cells that no target covers; shuffle; take K.
    """

    def __init__(self, config: MaskConfig, side: int) -> None:
        cell = config.coarsest
        if side % cell:
            below = side // cell * cell
            grids = " or ".join(f"{good} x {good}" for good in (below, below + cell) if good)
            divisors = ", ".join(str(good) for good in range(1, side + 1) if side % good == 0)
            raise ConfigError(
                f"method.masks.coarsest={cell} does not divide the grid of {side} x {side} patches; "
                f"use an image_size that gives {grids} patches, or one of {divisors}"
            )
        self.config = config
        self.cells = side // cell
        sizes = [_sizes(config.target_scale, config.target_ratio, self.cells)] * config.targets
        sizes.append(_sizes(config.context_scale, config.context_ratio, self.cells))
        self._sizes = torch.tensor([*sizes[0], *sizes[-1]])
        self._first_size = torch.tensor([0] * config.targets + [len(sizes[0])])
        self._least = math.ceil(config.min_context / cell**2)
        most = min(height * width for height, width in sizes[-1]) - max(height * width for height, width in sizes[0])
        if most < self._least:
            raise ConfigError(
                f"method.masks.min_context={config.min_context}: on a grid of {side} x {side} patches, with cells of "
                f"{cell} x {cell}, the smallest context outside one target may have {max(most, 0) * cell**2}; "
                "use a larger image_size or a smaller patch, min_context or target_scale, or finer cells (coarsest; "
                "for hjepa fewer levels)"
            )
        self._has_overhang = torch.tensor([config.edges == "overhang"] * config.targets + [False])
        self._sign = torch.tensor([-1.0] * config.targets + [1.0])
        index = torch.arange(self.cells + 1)
        self._lines = _inside(index[:, None], index, self.cells).float().flatten(0, 1)  # [(n + 1)^2, n]
        self._cell_index = torch.arange(self.cells**2)
        self._blocks = _block_table(set(sizes[0]), side=side, cell=cell, cut=config.edges == "overhang")
        rows, columns = self._cell_index // self.cells, self._cell_index % self.cells
        self._patches = ((rows * side + columns) * cell)[:, None] + torch.tensor(_quarters(cell, side))  # [N, cell^2]
        self._origins = self._patches[:, 0].contiguous()
        self._num_kept = self._choose_num_kept()

    def __call__(self, seed: int, epoch: int, ids: Tensor) -> dict[str, Tensor]:
        num_draws = self._num_draws
        draws = seeding.uniform(seed, epoch, ids, "masks", num_draws + len(self._cell_index))
        begin, end = self._put(draws[:, :num_draws])
        visible = self._visible(begin, end)  # [B, N]
        for repeated in range(self.config.targets - 1, 0, -1):
            short = (visible.sum(1) < self._least).nonzero()[:, 0]
            if not len(short):
                break
            begin[short, repeated], end[short, repeated] = begin[short, 0], end[short, 0]
            visible[short] = self._visible(begin[short], end[short])
        kept = self._keep(visible, draws[:, num_draws:])
        begin, size = begin[:, :-1], (end - begin)[:, :-1]  # the targets
        block = self._blocks.number[size[..., 0], size[..., 1]]  # [B, T]
        origin = self._origins[begin[..., 0] * self.cells + begin[..., 1]]
        masks = {
            "context": kept if self.config.coarsest == 1 else self._patches[kept].flatten(1),
            "targets": origin[..., None] + self._blocks.offsets[block],
        }
        # Asked here and not where it matters: there a GPU would have to be waited for.
        valid = self._blocks.is_new[block]
        return masks if valid.all() else {**masks, "target_valid": valid}

    @property
    def _num_draws(self) -> int:
        return 3 * (self.config.targets + 1)

    def _put(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """First row and column of each block and those after its last, int64 [B, T + 1, 2]; the context comes last."""
        which, where = draws.unflatten(1, (-1, 3)).split([1, 2], 2)
        size = self._sizes[(which[..., 0] * _STEPS**2).long() + self._first_size]  # [B, T + 1, 2]
        over = (size - 1) * self._has_overhang[:, None]
        # A product in float32 stays below the whole number: the draw is 2^-24 or more below 1.
        begin = (where * (self.cells + 1 - size + 2 * over)).long() - over
        return begin.clamp(min=0), (begin + size).clamp(max=self.cells)

    def _visible(self, begin: Tensor, end: Tensor) -> Tensor:
        """True for cells in the context block and in no target: bool [B, N]."""
        rows, columns = self._lines[begin * (self.cells + 1) + end].unbind(2)  # [B, T + 1, n]
        # One for the context block less one for each target.
        return (torch.bmm((rows * self._sign[:, None]).mT, columns) > 0.5).flatten(1)

    def _keep(self, visible: Tensor, draws: Tensor) -> Tensor:
        """Visible cells in random order [B, K], from the first again where there are fewer."""
        # The cell is in the low bits: no two keys are equal, so that every sort gives the same order.
        keys = (draws * (1 << 48)).long().add_(self._cell_index).masked_fill_(~visible, 1 << 62)
        # NumPy sorts whole numbers many times faster than torch, which carries indices along.
        order = torch.from_numpy(np.sort(keys.numpy(), 1))[:, : self._num_kept] & 0xFFFFFF
        rank, count = torch.arange(self._num_kept), visible.sum(1, keepdim=True)
        short = (count < self._num_kept).nonzero()[:, 0]
        order[short] = order[short].gather(1, rank % count[short])
        return order

    def _choose_num_kept(self) -> int:
        """Number of cells in every context."""
        keep = self.config.context_keep
        if keep != "auto":
            return max(round(keep * self.cells**2), self._least)
        draws = seeding.uniform(0, 0, torch.arange(1024), "masks.lengths", self._num_draws)
        lengths = self._visible(*self._put(draws)).sum(1).sort()[0]
        return max(int(lengths[int(len(lengths) * (1 - _USUALLY))]), self._least)


class PublishedMasks:
    """The sampler that was released with I-JEPA, with its three biases; for runs that repeat published ones.

    No block covers the last row or column, and none is as high or wide as the grid. One number gives both
    area and shape of all target blocks of a batch. Contexts are cut, in raster order, to the shortest of
    the batch, here that of all processes together; so masks depend on the batch, and the first image decides
    on the sizes. Where 20 positions of the context block leave no more than `min_context` patches, the
    last target no longer counts, then the one before. Names and shapes as in `BlockMasks`; no block is padded.
    """

    def __init__(self, config: MaskConfig, side: int) -> None:
        others = {"coarsest": 1, "edges": "inside", "context_keep": "auto"}
        changed = [f"{key}={getattr(config, key)}" for key, value in others.items() if getattr(config, key) != value]
        if changed:
            raise ConfigError(
                f"method.masks.parity=published has no {', '.join(changed)}; leave it out, or use unbiased"
            )
        self.config = config
        self.cells = side
        smallest = min(math.prod(self._size(kind, step / _STEPS)) for kind in _KINDS for step in range(_STEPS))
        if smallest <= config.min_context:
            raise ConfigError(
                f"method.masks.min_context={config.min_context}: on a grid of {side} x {side} patches the smallest "
                f"block of the published sampler has {smallest}, and it must have more; use a larger image_size, a "
                "smaller patch or min_context, or a larger target_scale"
            )

    def __call__(self, seed: int, epoch: int, ids: Tensor) -> dict[str, Tensor]:
        draws = seeding.uniform(seed, epoch, ids[:1], "masks.sizes", 2)[0].tolist()
        size = torch.tensor(self._size("target", draws[0]))
        where = seeding.uniform(seed, epoch, ids, "masks.targets", 2 * self.config.targets)
        begin = (where.unflatten(1, (-1, 2)) * (self.cells - size)).long()  # [B, T, 2]
        rows, columns = _inside(begin, begin + size, self.cells).unbind(2)
        taken = rows[..., :, None] & columns[..., None, :]  # [B, T, n, n]
        visible = self._context(seed, epoch, ids, taken.flatten(2), self._size("context", draws[1]))
        shortest = int(visible.sum(1).min())
        context = (visible & (visible.cumsum(1) <= shortest)).nonzero()[:, 1].view(len(ids), shortest)
        offsets = (torch.arange(int(size[0]))[:, None] * self.cells + torch.arange(int(size[1]))).flatten()
        targets = (begin[..., 0] * self.cells + begin[..., 1])[..., None] + offsets
        return {"context": context, "targets": targets}

    def _size(self, kind: _Kind, draw: float) -> tuple[int, int]:
        scale, ratio = (
            (self.config.target_scale, self.config.target_ratio)
            if kind == "target"
            else (self.config.context_scale, self.config.context_ratio)
        )
        area = int(self.cells**2 * (scale[0] + (scale[1] - scale[0]) * draw))
        shape = ratio[0] + (ratio[1] - ratio[0]) * draw
        height, width = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        return min(height, self.cells - 1), min(width, self.cells - 1)

    def _context(self, seed: int, epoch: int, ids: Tensor, taken: Tensor, shape: tuple[int, int]) -> Tensor:
        """Patches of the context, bool [B, N]; `taken` is bool [B, T, N]."""
        size = torch.tensor(shape)
        visible = torch.zeros(len(ids), self.cells**2, dtype=torch.bool)
        pending = torch.arange(len(ids))  # images without a context
        # The largest block has only one position: trying again is useless.
        tries = 1 if min(shape) == self.cells - 1 else _TRIES
        for counted in range(self.config.targets, -1, -1):
            allowed = ~taken[:, :counted].any(1)
            for attempt in range(tries):
                where = seeding.uniform(seed, epoch, ids[pending], f"masks.context.{counted}.{attempt}", 2)
                begin = (where * (self.cells - size)).long()
                rows, columns = _inside(begin, begin + size, self.cells).unbind(1)
                found = (rows[:, :, None] & columns[:, None, :]).flatten(1) & allowed[pending]
                visible[pending] = found
                pending = pending[found.sum(1) <= self.config.min_context]
                if not len(pending):
                    return visible
        raise AssertionError("a context block alone is large enough")


class _Blocks(NamedTuple):
    """The patches of every possible block; S sizes, M patches of the largest."""

    number: Tensor
    """int64 [n + 1, n + 1]: the row of a height and width in the other two."""
    offsets: Tensor
    """int64 [S, M]: patch numbers less that of the block's first patch; the last is repeated."""
    is_new: Tensor
    """bool [S, M]: false where repeated."""


def _block_table(sizes: set[tuple[int, int]], *, side: int, cell: int, cut: bool) -> _Blocks:
    """Return the table of these sizes; with `cut`, also of all their parts."""
    cells = side // cell
    if cut:
        heights, widths = (range(1, max(size[axis] for size in sizes) + 1) for axis in (0, 1))
        sizes = {(height, width) for height in heights for width in widths}
    number = torch.zeros(cells + 1, cells + 1, dtype=torch.int64)
    length = max(height * width for height, width in sizes) * cell**2
    offsets, is_new = (
        torch.zeros(len(sizes), length, dtype=torch.int64),
        torch.zeros(len(sizes), length, dtype=torch.bool),
    )
    within = torch.tensor(_quarters(cell, side))
    for row, (height, width) in enumerate(sorted(sizes)):
        corners = (torch.arange(height)[:, None] * side + torch.arange(width)).flatten() * cell
        patches = (corners[:, None] + within).flatten()
        number[height, width] = row
        offsets[row] = patches[torch.arange(length).clamp(max=len(patches) - 1)]
        is_new[row, : len(patches)] = True
    return _Blocks(number, offsets, is_new)


@cache
def _sizes(scale: tuple[float, float], ratio: tuple[float, float], cells: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths in cells for evenly spaced areas and shapes, from which one is drawn evenly.

    Areas stay within `scale` wherever whole cells allow it. A table rather than a formula, so that every
    machine rounds alike.
    """
    middles = [(step + 0.5) / _STEPS for step in range(_STEPS)]
    areas = [cells**2 * (scale[0] + (scale[1] - scale[0]) * middle) for middle in middles]
    shapes = [ratio[0] * (ratio[1] / ratio[0]) ** middle for middle in middles]
    bounds = (scale[0] * cells**2, scale[1] * cells**2)
    return tuple(
        _whole(math.sqrt(area * shape), math.sqrt(area / shape), bounds, cells, prefer_tall=(row + column) % 2 == 0)
        for row, area in enumerate(areas)
        for column, shape in enumerate(shapes)
    )


def _whole(height: float, width: float, areas: tuple[float, float], most: int, *, prefer_tall: bool) -> tuple[int, int]:
    """The nearest whole sides whose area lies within `areas`, or the nearest at all; `prefer_tall` decides ties."""
    choices = [
        (min(max(rows, 1), most), min(max(columns, 1), most))
        for rows in (math.floor(height), math.ceil(height))
        for columns in (math.floor(width), math.ceil(width))
    ]
    choices.sort(reverse=prefer_tall)
    fitting = [size for size in choices if areas[0] - 1e-9 <= math.prod(size) <= areas[1] + 1e-9]
    return min(fitting or choices, key=lambda size: abs(math.log(size[0] / height)) + abs(math.log(size[1] / width)))


def _quarters(cell: int, side: int) -> list[int]:
    """Patch numbers within a cell, less that of its first: quarter by quarter while it can be halved, else by rows."""
    if cell % 2:
        return [row * side + column for row in range(cell) for column in range(cell)]
    half = cell // 2
    quarter = _quarters(half, side)
    return [(row * side + column) * half + offset for row in (0, 1) for column in (0, 1) for offset in quarter]


def _inside(begin: Tensor, end: Tensor, cells: int) -> Tensor:
    """Rows and columns between `begin` and `end` [..., 2]: bool [..., 2, n]."""
    index = torch.arange(cells)
    return (index >= begin[..., None]) & (index < end[..., None])
