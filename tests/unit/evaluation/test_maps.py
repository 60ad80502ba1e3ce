"""Maps show every patch, are the means of a plain loop, and are the same each time."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from opsin.data.base import Views
from opsin.data.digits import load_digits
from opsin.data.masks import MaskConfig
from opsin.errors import ConfigError
from opsin.evaluation.labelled import spread_evenly
from opsin.evaluation.map_pictures import heat, outlines, shade
from opsin.evaluation.maps import Maps, MapsConfig, covering_masks
from opsin.methods.hjepa import coarser
from opsin.methods.ijepa import Cells, IJepa, Level, LevelErrors
from opsin.methods.supervised import SupervisedConfig
from opsin.nn.convnet import ConvNetConfig
from opsin.reporting import read_rows
from opsin.results import evaluate_run
from opsin.rundir import RunDirectory
from tests.digits_run import train_digits
from tests.unit.evaluation.digits import CPU, still
from tests.unit.methods.jepa_parts import FACTS, GRID, batch_of, build_hjepa, build_ijepa

HJEPA = (
    "method.name=hjepa",
    "method.levels=2",
    "method.predictor_depth=1",
    "method.masks.min_context=4",
    "model.class_token=false",
    "model.pool=mean",
    "model.patch=1",
    "evaluators={val: null, maps: {every: 1 epoch, images: 3}}",
    "checkpoints.best=null",
    "epochs=1",
    "limits.steps=2",
)


class Places:
    """Says of each cell, as its error, where it lies: its number plus a hundred for each image."""

    def views(self, image_size: int) -> Views:
        return Views({}, masks=MaskConfig(coarsest=4).build(GRID * 2))

    def explain(self, images: Tensor, masks: Mapping[str, Tensor]) -> Sequence[LevelErrors]:
        finest = Cells(masks["targets"], masks["target_valid"], 1)
        found = [finest, coarser(finest, 2, GRID * 2), coarser(finest, 4, GRID * 2)]
        shift = 1000.0 * torch.arange(len(images))[:, None, None]
        # A number that must not be counted stands wherever there is only padding.
        return [
            LevelErrors(cells, GRID * 2 // cells.side, (cells.indices + shift).masked_fill(~cells.valid, 1e9))
            for cells in found
        ]


class Perfect(IJepa):
    """Predicts its targets."""

    def predict_levels(self, images: Tensor, masks: Mapping[str, Tensor]) -> tuple[Tensor, list[Level]]:
        context, levels = super().predict_levels(images, masks)
        return context, [replace(level, targets=level.predictions) for level in levels]


def maps_in(folder: Path, count: int = 3, repeats: int = 2) -> Maps:
    data = still(spread_evenly(load_digits(), count))
    return Maps(data, autocast=nullcontext, device=CPU, folder=folder, repeats=repeats)


def test_every_cell_of_every_level_has_the_mean_of_its_own_errors(tmp_path: Path) -> None:
    maps, blocks = maps_in(tmp_path).errors(Places(), torch.zeros(2, 3, 32, 32))
    assert [found.shape[1] for found in maps] == [16, 8, 4]
    for found in maps:
        cells = torch.arange(found[0].numel()).view_as(found[0])
        torch.testing.assert_close(found, torch.stack([cells.float(), cells + 1000.0]), rtol=1e-5, atol=0)
    for level, across in enumerate((16, 8, 4)):
        hidden = [cell for mask in blocks for block in mask.cells[level] for cell in block]
        assert min(hidden.count(cell) for cell in range(across**2)) >= 2


@pytest.mark.parametrize("masks", ["ragged cells", "equal cells"])
def test_errors_are_the_means_of_a_plain_loop(masks: str, tmp_path: Path) -> None:
    method = build_hjepa(masks).eval()
    images = batch_of(method).views["image"][0][:2]
    with torch.no_grad():
        maps, _ = maps_in(tmp_path).errors(method, images)
    sampler = method.views(32).masks
    assert sampler is not None
    apart: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for drawn in covering_masks(sampler, 2):
        here = {name: mask.repeat(2, *[1] * (mask.ndim - 1)) for name, mask in drawn.items()}
        with torch.no_grad():
            _, levels = method.predict_levels(images, here)
        for number, level in enumerate(levels):
            for b, t, k in level.cells.valid.nonzero().tolist():
                off = (level.predictions[b, t, k] - level.targets[b, t, k]).abs()
                error = sum(0.5 * x * x if x < 1 else x - 0.5 for x in off.tolist()) / len(off)
                apart[number, b, int(level.cells.indices[b, t, k])].append(error)
    # The evaluator may end earlier than the masks: with the first that leaves no patch rare.
    assert {key for key in apart if key[0] == 0} == {(0, b, cell) for b in range(2) for cell in range(GRID**2)}
    for (level, b, cell), errors in apart.items():
        assert maps[level][b].flatten()[cell].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_a_perfect_predictor_has_no_error(tmp_path: Path) -> None:
    method = build_ijepa().float()
    method.__class__ = Perfect
    data = replace_size(maps_in(tmp_path))
    report = data.report(method, "perfect")
    assert report.values["error_0"] == 0
    method.__class__ = IJepa
    assert data.report(method, "other").values["error_0"] > 0
