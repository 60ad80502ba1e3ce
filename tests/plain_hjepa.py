"""I-JEPA on several levels in plain torch, to compare a faster implementation with.

Level l predicts means over 2^l x 2^l neighbouring patches of the target encoder's tokens. Each level has a predictor
of its own; from the coarsest level to the patches, each is told what the level above predicted for the place.
With one level this is `PlainIJepa`, to the last bit. See `tests/plain_ijepa.py` for the order within a step.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.plain_dino import plain_ema
from tests.plain_ijepa import (
    PlainEncoder,
    PlainPredictor,
    gather_tokens,
    patch_positions,
    plain_layer_norm,
    plain_positions,
    plain_smooth_l1,
)

# B images, h x w the grid of N patches, D width of the encoder, P of the predictor, Kc context patches of an image,
# T target blocks of an image, Kt patches of a block, L levels, Cl cells of a block on level l; C0 = Kt


@dataclass(frozen=True)
class BlockCells:
    """The cells of all target blocks on one level: indices [B, T, Cl], row by row on the level's own grid.

    `weights` [B, T, Cl] are 0 where an index is only padding; None where none is.
    """

    indices: Tensor
    weights: Tensor | None


class PlainHJepa(nn.Module):
    """Context encoder, target encoder and one predictor per level; the target encoder starts as a copy.

    `depths` tell after how many blocks of the target encoder each level, finest first, takes its tokens. After all
    blocks the final norm applies, after fewer it does not. The finest level takes all of them.
    """

    def __init__(
        self,
        patch_px: int,
        width: int,
        depth: int,
        heads: int,
        predictor_width: int,
        predictor_depth: int,
        predictor_heads: int | None = None,
        *,
        depths: Sequence[int],
    ) -> None:
        super().__init__()
        if depths[0] != depth:
            raise ValueError(f"depths[0] is {depths[0]}; the finest level takes the tokens after all {depth} blocks")
        self.depths = tuple(depths)
        self.encoder = PlainEncoder(patch_px, width, depth, heads)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictors = nn.ModuleList(
            PlainPredictor(width, predictor_width, predictor_depth, predictor_heads or heads) for _ in depths
        )
        # Level l takes what level l + 1 predicts; the coarsest has nothing above it.
        self.hints = nn.ModuleList(nn.Linear(width, predictor_width) for _ in depths[1:])
        for linear in self.hints:
            assert isinstance(linear, nn.Linear)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def loss(
        self,
        images: Tensor,
        context: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        *,
        level_weights: Sequence[float],
    ) -> Tensor:
        """Sum over levels of weight x loss. The other arguments are those of `PlainIJepa.loss`."""
        losses = self.level_losses(images, context, targets, weights)
        return torch.stack([w * loss for w, loss in zip(level_weights, losses, strict=True)]).sum()

    def level_losses(
        self, images: Tensor, context: Tensor, targets: Tensor, weights: Tensor | None = None
    ) -> list[Tensor]:
        """The mean of the smooth L1 of each level, finest first, over the valid cells of that level."""
        grid = (images.shape[2] // self.encoder.patch_px, images.shape[3] // self.encoder.patch_px)
        levels = [block_cells(targets, weights, level, grid) for level in range(len(self.depths))]
        predictions = self.predictions(images, context, levels)
        losses = []
        for level, cells in enumerate(levels):
            wanted = self.targets(images, level, cells)
            losses.append(plain_smooth_l1(predictions[level], wanted, cells.weights))
        return losses

    def predictions(self, images: Tensor, context: Tensor, levels: Sequence[BlockCells]) -> list[Tensor]:
        """[B, T, Cl, D] of each level, finest first, each block by a call of its own."""
        columns = images.shape[3] // self.encoder.patch_px
        tokens = self.encoder(images, context)  # [B, Kc, D]
        found: dict[int, Tensor] = {}
        for level in reversed(range(len(levels))):
            cells = levels[level]
            predictor = self.predictors[level]
            assert isinstance(predictor, PlainPredictor)
            places = patch_positions(context, columns, predictor.width)  # [B, Kc, P]
            asked = cell_positions(cells.indices, level, columns, predictor.width)  # [B, T, Cl, P]
            hints = None
            if level + 1 < len(levels):
                above = values_above(found[level + 1], cells, levels[level + 1], columns >> level)  # [B, T, Cl, D]
                hints = self.hints[level](above)  # [B, T, Cl, P]
            blocks = []
            for t in range(cells.indices.shape[1]):
                valid = None if cells.weights is None else cells.weights[:, t] > 0  # [B, Cl]
                hint = None if hints is None else hints[:, t]
                blocks.append(predictor(tokens, places, asked[:, t], valid, hint))  # [B, Cl, D]
            found[level] = torch.stack(blocks, dim=1)
        return [found[level] for level in range(len(levels))]

    @torch.no_grad()
    def targets(self, images: Tensor, level: int, cells: BlockCells) -> Tensor:
        """[B, T, Cl, D]: tokens of the whole image, averaged within cells, each mean normed, the blocks gathered."""
        if self.depths[level] == len(self.target_encoder.blocks):
            tokens = self.target_encoder(images)  # [B, N, D]
        else:
            tokens = self.target_encoder.after_blocks(images, self.depths[level])
        means = cell_means(tokens, level, images.shape[3] // self.encoder.patch_px)
        normed = plain_layer_norm(means)  # [B, N / 4^l, D]
        blocks = cells.indices
        return torch.stack([gather_tokens(normed, blocks[:, t]) for t in range(blocks.shape[1])], dim=1)

    def named_trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of context encoder, predictors and hints, for `plain_adamw`."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def move_targets(self, momentum: float) -> None:
        """The target encoder moved towards the context encoder, after the optimizer's update."""
        plain_ema(self.target_encoder, self.encoder, momentum)


def block_cells(targets: Tensor, weights: Tensor | None, level: int, grid: tuple[int, int]) -> BlockCells:
    """The cells that each block's patches [B, T, Kt] fill, in ascending order; on level 0 the patches as given.

    Raises:
        ValueError: the grid is not made of whole cells, or a block fills one only in part.
    """
    side = 2**level
    if grid[0] % side or grid[1] % side:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} patches has no whole cells of {side} x {side}; use another")
    if level == 0:
        return BlockCells(targets, weights)
    found: list[list[list[int]]] = []
    for b in range(targets.shape[0]):
        found.append([])
        for t in range(targets.shape[1]):
            patches = targets[b, t] if weights is None else targets[b, t][weights[b, t] > 0]
            counts: dict[int, int] = {}
            for index in patches.tolist():
                cell = _cell_of(index, grid[1], side)
                counts[cell] = counts.get(cell, 0) + 1
            if any(count != side**2 for count in counts.values()):
                raise ValueError(f"block {t} of image {b} fills a cell of level {level} in part; use whole cells")
            found[b].append(sorted(counts))
    most = max(len(cells) for blocks in found for cells in blocks)
    indices = targets.new_zeros(len(found), targets.shape[1], most)  # [B, T, Cl]
    valid = torch.zeros_like(indices, dtype=torch.float64)
    for b, blocks in enumerate(found):
        for t, cells in enumerate(blocks):
            indices[b, t, : len(cells)] = torch.tensor(cells, dtype=indices.dtype, device=indices.device)
            valid[b, t, : len(cells)] = 1
    return BlockCells(indices, None if weights is None else valid.to(weights.dtype))


def cell_means(tokens: Tensor, level: int, columns: int) -> Tensor:
    """[B, N / 4^l, D]: `tokens` [B, N, D] averaged within 2^l x 2^l neighbours, row by row."""
    side = 2**level
    rows = tokens.shape[1] // columns
    means = []
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            inside = [
                tokens[:, row * columns + column]  # [B, D]
                for row in range(top, top + side)
                for column in range(left, left + side)
            ]
            means.append(torch.stack(inside).mean(dim=0))
    return torch.stack(means, dim=1)


def cell_positions(cells: Tensor, level: int, columns: int, width: int) -> Tensor:
    """Embeddings [..., width] of the centres of cells, in units of patches; a patch's centre is its index."""
    side = 2**level
    across = columns // side
    rows = (cells // across) * side + (side - 1) / 2
    return plain_positions(rows, (cells % across) * side + (side - 1) / 2, width)


def values_above(values: Tensor, cells: BlockCells, above: BlockCells, columns: int) -> Tensor:
    """[B, T, Cl, D]: for each of `cells`, out of `values` [B, T, C(l+1), D] that of the cell it lies in.

    `columns` are those of the finer grid. Padding takes the first value there is; nothing looks at it.
    """
    images = []
    for b in range(cells.indices.shape[0]):
        blocks = []
        for t in range(cells.indices.shape[1]):
            # Only the first of equal indices counts: later ones are padding.
            coarse = above.indices[b, t].tolist()
            where = []
            for c, index in enumerate(cells.indices[b, t].tolist()):
                is_padding = cells.weights is not None and float(cells.weights[b, t, c]) == 0
                where.append(0 if is_padding else coarse.index(_cell_of(index, columns, 2)))
            blocks.append(values[b, t, where])  # [Cl, D]
        images.append(torch.stack(blocks))
    return torch.stack(images)


def _cell_of(index: int, columns: int, side: int) -> int:
    row, column = index // columns, index % columns
    return row // side * (columns // side) + column // side
