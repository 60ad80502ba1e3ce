"""Maps show every patch, are the means of a plain loop, and are the same each time."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from opsin.data.base import Views
from opsin.data.loading import EvaluationData, LoadingPlan
from opsin.data.sources.digits import load_digits
from opsin.data.views.masks import MaskConfig
from opsin.errors import ConfigError
from opsin.evaluation.labelled import spread_evenly
from opsin.evaluation.map_pictures import heat, outlines, shade
from opsin.evaluation.maps import Maps, MapsConfig, covering_masks
from opsin.methods.hjepa import coarser
from opsin.methods.ijepa import Cells, IJepa, IJepaConfig, Level, LevelErrors
from opsin.methods.supervised import SupervisedConfig
from opsin.nn.convnet import ConvNetConfig
from opsin.nn.vit import Block
from opsin.reporting.journal import read_rows
from opsin.run.results import evaluate_run
from tests.digits_run import train_digits
from tests.unit.evaluation.digits import CPU, context_of
from tests.unit.methods.jepa_parts import FACTS, GRID, SMALL, VIT, batch_of, build_hjepa, build_ijepa

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
        finest = Cells.of(masks)
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


def maps_in(folder: Path, images: int = 3) -> Maps:
    """The evaluator on some of the digits, made as large as the images of `jepa_parts`."""
    source = spread_evenly(load_digits(), images)
    plan = LoadingPlan(source=source, facts=replace(FACTS, samples=images), device=CPU)
    data = EvaluationData(plan, resize=32)
    return Maps(MapsConfig(repeats=2), context_of(data, folder))


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
        for number, said in enumerate(levels):
            for b, t, k in said.cells.valid.nonzero().tolist():
                off = (said.predictions[b, t, k] - said.targets[b, t, k]).abs()
                error = sum(0.5 * x * x if x < 1 else x - 0.5 for x in off.tolist()) / len(off)
                apart[number, b, int(said.cells.indices[b, t, k])].append(error)
    assert {key for key in apart if key[0] == 0} == {(0, b, cell) for b in range(2) for cell in range(GRID**2)}
    for (level, b, cell), errors in apart.items():
        assert maps[level][b].flatten()[cell].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_a_perfect_predictor_has_no_error(tmp_path: Path) -> None:
    method, maps = build_ijepa().float(), maps_in(tmp_path)
    assert maps.report(method, "usual").values["error_0"] > 0.01
    method.__class__ = Perfect
    assert maps.report(method, "perfect").values["error_0"] == 0


def test_what_no_mask_hides_has_no_number(tmp_path: Path) -> None:
    # The released sampler leaves out the last row and column.
    masks = {"parity": "published", "target_scale": (0.3, 0.4), "min_context": 4}
    method = IJepaConfig.model_validate({**SMALL, "masks": masks}).build(VIT, FACTS).eval()
    with torch.no_grad():
        (found,), _ = maps_in(tmp_path).errors(method, batch_of(method, dtype=torch.float32).views["image"][0])
    assert found[:, :-1, :-1].isfinite().all()
    assert found[:, -1].isnan().all()
    assert found[:, :, -1].isnan().all()
    assert not torch.from_numpy(heat(found[0], 0.0, 1.0)).isnan().any()


def test_pictures_and_numbers_are_the_same_each_time_and_all_is_left_as_it_was(tmp_path: Path) -> None:
    method = build_hjepa().float()
    method.encoder.norm.eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    first = maps_in(tmp_path).report(method, "first")
    assert torch.equal(torch.rand(4), expected)
    assert (method.training, method.encoder.norm.training, method.backbone.training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    second = maps_in(tmp_path).report(method, "second")
    assert set(first.values) == {"error_0", "error_1", "error_2", "attention_spread"}
    assert second.values == first.values
    names = ["first-predictions.png", "first-attention.png"]
    assert [path.name for path in first.pictures] == names
    for one, other in zip(first.pictures, second.pictures, strict=True):
        assert one.read_bytes() == other.read_bytes()
        with Image.open(one) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.width > 2 * 128
            assert picture.height > 3 * 128


@pytest.mark.usefixtures("torch_switches")
def test_a_run_draws_maps_and_can_be_asked_for_them(tmp_path: Path) -> None:
    train_digits(tmp_path / "run", *HJEPA)
    scores = [row.values for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "maps/error_1" in row.values]
    folder = tmp_path / "run" / "maps"
    assert {path.name for path in folder.iterdir()} == {"step-00000002-predictions.png", "step-00000002-attention.png"}
    report = evaluate_run(tmp_path / "run", ["maps"])["maps"]
    assert (folder / "final-predictions.png").read_bytes() == (folder / "step-00000002-predictions.png").read_bytes()
    assert report.as_dict()["error_1"] == scores[-1]["maps/error_1"]
    assert report.lines()[1] == f"wrote {folder / 'final-predictions.png'}"
    evaluate_run(tmp_path / "run" / "checkpoints" / "step-00000002", ["maps"])
    evaluate_run(tmp_path / "run", ["maps"], weights="initial")
    assert (folder / "initial-predictions.png").exists()


def test_a_supervised_transformer_has_maps_of_attention_alone(tmp_path: Path) -> None:
    method = SupervisedConfig().build(VIT.model_copy(update={"class_token": True, "pool": "token"}), FACTS)
    MapsConfig().check(method, "maps")
    maps = maps_in(tmp_path)
    maps.step = 7
    assert set(maps.evaluate(method)) == {"attention_spread"}
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["step-00000007-attention.png"]


def test_a_network_without_anything_to_draw_is_refused() -> None:
    method = SupervisedConfig().build(ConvNetConfig(widths=(4, 4, 4)), FACTS)
    with pytest.raises(ConfigError, match=r"^evaluators\.looks: there are no maps of a Supervised .* model\.name=vit"):
        MapsConfig().check(method, "looks")


def test_attention_that_is_even_is_spread_over_all_patches(tmp_path: Path) -> None:
    method = build_ijepa().float()
    with torch.no_grad():
        last = method.backbone.blocks[-1]
        assert isinstance(last, Block)
        last.attn.qkv.weight.zero_()
        last.attn.qkv.bias.zero_()
    assert maps_in(tmp_path).report(method, "even").values["attention_spread"] == pytest.approx(1)


def test_images_are_at_even_distances_labelled_or_not() -> None:
    digits = load_digits()
    digits.labels = torch.full_like(digits.labels, -1)
    assert spread_evenly(digits, 4).indices.tolist() == [0, 449, 898, 1347]
    few = spread_evenly(digits, 1)
    assert spread_evenly(few, 8).indices.tolist() == [0]


def test_what_is_not_seen_is_greyed() -> None:
    image = torch.rand(3, 8, 8)
    seen = torch.tensor([[True, False], [False, False]])
    found = shade(image, seen)
    assert torch.equal(found[:, :4, :4], image[:, :4, :4])
    assert torch.equal(found[0, 4:], found[1, 4:])
    assert not torch.equal(found[:, :4, 4:], image[:, :4, 4:])


def test_blocks_are_outlined_with_their_cells() -> None:
    # Two rows and one column of a grid of four.
    *cells, block = outlines([[5, 9]], 4)
    assert [(cell.left, cell.top, cell.width) for cell in cells] == [(0.25, 0.25, 0.25), (0.25, 0.5, 0.25)]
    assert (block.left, block.top, block.width, block.height) == (0.25, 0.25, 0.25, 0.5)
    assert block.thick
