"""A run, its checkpoints and its export are the same network."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from opsin.errors import CheckpointError, ConfigError, RunError
from opsin.evaluation.accuracy import AccuracyReport
from opsin.reporting.journal import read_rows
from opsin.run.results import ScoreName, Weights, evaluate_run, export_run, load
from tests.digits_run import CONVNET, STEPS_PER_EPOCH, VIT, train_digits
from tests.unit.data.pictures import fill

SCORES: tuple[ScoreName, ...] = ("knn", "linear")

pytestmark = pytest.mark.usefixtures("torch_switches")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "run"
    train_digits(folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A finished run of its own."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def pictures() -> Tensor:
    return torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"step-{2 * STEPS_PER_EPOCH:08}"


def test_run_checkpoint_and_export_give_equal_features(run: Path, pictures: Tensor) -> None:
    places = [run, last_checkpoint(run), export_run(run, None), export_run(last_checkpoint(run), run.parent / "out")]
    encoders = [load(place) for place in places]
    for encoder in encoders[1:]:
        assert torch.equal(encoder(pictures), encoders[0](pictures))
        assert torch.equal(encoder.classify(pictures), encoders[0].classify(pictures))
    assert encoders[0].classes == tuple("0123456789")


def test_an_earlier_checkpoint_is_another_network(run: Path, pictures: Tensor) -> None:
    first, last = run / "checkpoints" / f"step-{STEPS_PER_EPOCH:08}", last_checkpoint(run)
    assert not torch.equal(load(first)(pictures), load(last)(pictures))


def test_a_run_that_was_stopped_gives_its_newest_valid_checkpoint(run: Path, pictures: Tensor) -> None:
    whole = load(run)(pictures)
    first = load(run / "checkpoints" / f"step-{STEPS_PER_EPOCH:08}")(pictures)
    (run / "model.safetensors").unlink()
    assert torch.equal(load(run)(pictures), whole)
    (last_checkpoint(run) / "state.pt").write_bytes(b"damaged")
    assert torch.equal(load(run)(pictures), first)


def test_the_scores_of_a_run_are_those_of_its_last_evaluation(run: Path) -> None:
    last = list(read_rows(run / "metrics.jsonl"))[-1].values
    confusion = json.loads((run / "confusion.json").read_text())["confusion"]
    for place in (run, last_checkpoint(run)):
        report = evaluate_run(place)["accuracy"]
        assert isinstance(report, AccuracyReport)
        assert report.values == {name.removeprefix("val/"): last[name] for name in last if name.startswith("val/")}
        assert report.confusion.tolist() == confusion
        assert report.images == 359


def test_features_are_scored_as_the_run_scores_them(tmp_path: Path) -> None:
    keys = (
        "evaluators.near.name=knn",
        "evaluators.near.k=5",
        "evaluators.near.bank_images=900",
        "evaluators.linear={}",
    )
    train_digits(tmp_path / "run", "epochs=1", *keys)
    last = list(read_rows(tmp_path / "run" / "metrics.jsonl"))[-1].values
    reports = evaluate_run(tmp_path / "run", ("knn", "linear"))
    for prefix, report in zip(("near", "linear"), reports.values(), strict=True):
        for score in ("top1", "top5"):
            assert report.as_dict()[score] == last[f"{prefix}/{score}"]
    assert reports["knn"].as_dict()["bank"] == 900
    assert reports["knn"].lines()[0].startswith("k-NN (k 5) top-1 ")


def test_scores_that_share_features_are_those_taken_one_by_one(tmp_path: Path) -> None:
    train_digits(tmp_path / "run", "epochs=1", "ema.decay=0.9", "evaluators={knn: {}, linear: {}}")
    last = list(read_rows(tmp_path / "run" / "metrics.jsonl"))[-1].values
    kinds: list[tuple[Weights, str]] = [("raw", ""), ("ema", "_ema")]
    for weights, suffix in kinds:
        alone = {name: evaluate_run(tmp_path / "run", (name,), weights=weights)[name] for name in SCORES}
        together = evaluate_run(tmp_path / "run", SCORES, weights=weights)
        for name in SCORES:
            assert together[name].as_dict() == alone[name].as_dict()
            assert last[f"{name}{suffix}/top1"] == alone[name].as_dict()["top1"]


def test_features_of_several_blocks_are_scored_on_demand_as_by_the_recipe(tmp_path: Path) -> None:
    one = ("epochs=1", "evaluators.val=null", "evaluators.knn={}")
    train_digits(tmp_path / "one", *one, model=VIT)
    train_digits(tmp_path / "two", *one, "evaluators.knn.blocks=2", model=VIT)
    scored = {
        place: list(read_rows(tmp_path / place / "metrics.jsonl"))[-1].values["knn/top1"] for place in ("one", "two")
    }
    asked = {
        blocks: evaluate_run(tmp_path / "one", ("knn",), blocks=blocks)["knn"].as_dict()["top1"]
        for blocks in (None, 1, 2)
    }
    assert asked == {None: scored["one"], 1: scored["one"], 2: scored["two"]}
    assert scored["one"] != scored["two"], "other features have another score, as a rule: seed 0 follows it"
    assert evaluate_run(tmp_path / "two", ("knn",))["knn"].as_dict()["top1"] == scored["two"]
    for blocks in (0, 3):
        with pytest.raises(
            ConfigError, match=rf"evaluators.knn.blocks={blocks}: there are features of 2 blocks here; use 1 to 2"
        ):
            evaluate_run(tmp_path / "one", ("knn",), blocks=blocks)


def test_blocks_are_refused_where_no_features_are_scored(run: Path) -> None:
    with pytest.raises(ConfigError, match="--blocks 2: accuracy cannot use it; name knn or linear, or leave it out"):
        evaluate_run(run, blocks=2)


@pytest.mark.parametrize(
    ("model", "rule"), [(VIT, "2 blocks here; use 1 to 2"), (CONVNET, "1 blocks here; use 1, or a method")]
)
def test_more_blocks_than_there_are_are_refused_before_a_run_begins(
    model: tuple[str, ...], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"evaluators.linear.blocks=3: there are features of {rule}"):
        train_digits(tmp_path / "run", "evaluators.linear={blocks: 3}", model=model)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_weights_that_a_run_began_with_can_be_scored_without_any_saved(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    before = sorted(run.iterdir())
    first, again = (evaluate_run(run, ("knn",), weights="initial")["knn"].as_dict() for _ in range(2))
    assert first == again
    assert sorted(run.iterdir()) == before


def test_other_images_are_scored_where_they_have_labels(run: Path, tmp_path: Path) -> None:
    reports = evaluate_run(run, ("accuracy", "knn"), data="digits")
    assert reports["accuracy"].as_dict()["images"] == 1797
    assert (reports["knn"].as_dict()["images"], reports["knn"].as_dict()["bank"]) == (359, 1438)
    pictures = str(fill(tmp_path / "pictures", *(f"{kind}/{n}.png" for kind in "ab" for n in range(5))))
    assert evaluate_run(run, ("knn",), data=pictures)["knn"].as_dict()["images"] == 2
    with pytest.raises(ConfigError, match=r"--data: these images have 2 classes, the run 10.*take knn and linear"):
        evaluate_run(run, data=pictures)
    with pytest.raises(ConfigError, match="--data nowhere: no such file"):
        evaluate_run(run, data="nowhere")


def test_timm_loads_the_export(run: Path, pictures: Tensor) -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        embed_dim=16,
        depth=1,
        num_heads=2,
        mlp_ratio=2,
        num_classes=0,
        checkpoint_path=str(export_run(run, None) / "backbone.safetensors"),
    ).eval()
    encoder = load(run)
    with torch.no_grad():
        features = theirs(encoder.prepare(pictures))
    # timm joins the products of attention in another order.
    torch.testing.assert_close(features, encoder(pictures), rtol=1e-4, atol=1e-5)


def test_a_place_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "checkpoints" / "step-00000001"):
        for use in (load, evaluate_run):
            with pytest.raises(RunError, match="is no run directory and no checkpoint of one"):
                use(place)


def test_damaged_weights_are_named_with_the_way_out(run: Path) -> None:
    (run / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model.safetensors: is damaged .*delete it to use the checkpoints"):
        load(run)
    (run / "model.safetensors").unlink()
    for path in (run / "checkpoints").glob("step-*/state.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError) as caught:
        load(run)
    assert len(caught.value.faults) == 3
    assert caught.value.faults[-1] == f"{run}: no valid weights; start over with --fresh"


def test_weights_of_another_network_are_refused(run: Path) -> None:
    card = run / "encoder.json"
    card.write_text(card.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(
        CheckpointError, match=r"does not fit the recipe beside it \(size mismatch .*undo the change"
    ) as caught:
        load(run)
    assert "\n" not in str(caught.value)


def test_without_validation_images_there_is_no_score(run: Path) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("holdout: 0.2", "holdout: 0.0"))
    with pytest.raises(ConfigError, match=r"has no validation images; set data\.holdout"):
        evaluate_run(run)
    with pytest.raises(
        ConfigError, match=r"evaluators\.knn: there are no validation images to score; set data\.holdout"
    ):
        evaluate_run(run, ("knn",))


def test_an_export_that_cannot_be_written_says_where_else_to_go(run: Path) -> None:
    (run.parent / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot be written: .*choose another with --out"):
        export_run(run, run.parent / "file")
