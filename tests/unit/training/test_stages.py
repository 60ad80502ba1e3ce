"""A recipe's stages become those of a run: lengths, what each changes, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

import opsin
from opsin.errors import ConfigError
from opsin.reporting.journal import read_events, read_rows
from opsin.run.recipe import Recipe, read
from opsin.run.results import evaluate_run
from opsin.run.session import resume_run, train_recipe
from opsin.storage.teller import Silence
from opsin.training.checkpoints.format import find_checkpoints, read_checkpoint
from opsin.training.stages import plan_time
from tests.digits_run import digits_recipe, train_digits
from tests.story import Record

pytestmark = pytest.mark.usefixtures("torch_switches")


class Pictures:
    """Sixty pictures of two classes, of which only the labels are asked for."""

    name = "sixty pictures"
    classes: tuple[str, ...] = ("cat", "dog")
    labels = torch.tensor([0] * 40 + [1] * 20)

    def __len__(self) -> int:
        return 60

    def read(self, index: int) -> torch.Tensor:
        raise NotImplementedError

    def location(self, index: int) -> str:
        return str(index)


def staged(*stages: dict[str, object], **keys: object) -> Recipe:
    texts = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return digits_recipe("epochs=null", f"stages={json.dumps(stages)}", *texts)


def test_a_stage_takes_from_the_recipe_what_it_does_not_say() -> None:
    recipe = staged(
        {"epochs": 2, "batch_size": 10, "data_fraction": 0.5, "image_size": 6, "train": ["head.*"], "mix": False},
        {"name": "last", "epochs": 1, "lr_scale": 0.1, "label_smoothing": 0.2},
        batch_size=20,
    )
    first, last = plan_time(recipe, Pictures(), Silence()).stages
    assert (first.name, first.steps, first.batch_size, first.image_size) == ("stage 1", 6, 10, 6)
    assert (first.data_fraction, first.train, first.mix, first.lr_scale) == (0.5, ("head.*",), False, 1.0)
    assert (last.name, last.steps, last.batch_size, last.image_size) == ("last", 3, 20, 8)
    assert (last.data_fraction, last.train, last.mix, last.lr_scale) == (1.0, ("*",), True, 0.1)
    assert (first.label_smoothing, last.label_smoothing) == (None, 0.2)


def test_epochs_stretch_all_stages_and_that_is_said() -> None:
    record = Record()
    recipe = staged({"epochs": 1}, {"epochs": 3}, batch_size=10).model_copy(update={"epochs": 2})
    timeline = plan_time(recipe, Pictures(), record)
    assert [stage.steps for stage in timeline.stages] == [3, 9]
    assert record.notices == ["stages: 4 epochs in all, stretched to 2 (epochs)"]


def test_a_recipe_without_stages_is_one_stage() -> None:
    (stage,) = plan_time(digits_recipe("epochs=3", "batch_size=10"), Pictures(), Silence()).stages
    assert (stage.steps, stage.image_size, stage.train) == (18, 8, ("*",))


def test_a_run_has_some_length() -> None:
    with pytest.raises(
        ConfigError, match="epochs is missing; give the passes over the images as epochs=VALUE, or stages"
    ):
        digits_recipe("epochs=null")


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ({"batch_size": 61}, r"stages.1.batch_size=61: there are only 60 .*use stages.1.batch_size=60 or less"),
        ({"data_fraction": 0.02}, r"stages.1.data_fraction=0.02: of the 20 images of class 'dog' none would be left"),
        ({"data_fraction": 0.1}, r"^batch_size=10: there are only 6 training images in stages.1.data_fraction=0.1"),
        ({"batch_size": 1}, r"accumulate=2: a batch of 1 images \(stages.1.batch_size\) cannot be split into 2 parts"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_stage_that_the_images_cannot_fill_is_refused(stage: dict[str, object], fault: str) -> None:
    recipe = staged({"epochs": 1}, {"epochs": 1, **stage}, batch_size=10, accumulate=2)
    with pytest.raises(ConfigError, match=fault):
        plan_time(recipe, Pictures(), Silence())


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("{epochs: 1, image_size: 7}", r"stages.0.image_size=7: .*7 x 7 pixels cannot be cut into such patches"),
        ("{epochs: 1, train: [heads.*]}", r"stages.0.train: 'heads.\*' matches no parameter; names begin with .*head"),
    ],
)
def test_a_stage_that_the_network_cannot_take_is_refused_before_the_first_step(
    stage: str, fault: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=fault):
        train_digits(tmp_path / "run", f"stages=[{stage}]", "epochs=null")


def test_a_network_of_timm_that_takes_one_size_only_says_so(tmp_path: Path) -> None:
    vit = ("model.name=vit_tiny_patch16_224", "model.options={depth: 1}", "data.image_size=32", "epochs=null")
    stages = "stages=[{epochs: 0.2, image_size: 16}]"
    with pytest.raises(ConfigError, match=r"stages.0.image_size=16: the network is made for images of 32 pixels.*dyn"):
        train_digits(tmp_path / "run", stages, *vit, model=())
    train_digits(tmp_path / "run", stages, *vit, "model.options.dynamic_img_size=true", model=())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages: small and half of the images, the head alone, everything; weights averaged."""
    folder = tmp_path_factory.mktemp("staged") / "run"
    stages = (
        "stages=[{name: small, epochs: 1, image_size: 6, batch_size: 128, data_fraction: 0.5},"
        "{name: head, epochs: 1, train: [head.*]}, {name: whole, epochs: 1}]"
    )
    train_digits(folder, stages, "epochs=null", "ema.decay=0.9", "checkpoints.keep=9")
    return folder


def test_each_stage_is_an_event_with_what_it_changes_and_what_froze(run: Path) -> None:
    found = [event for event in read_events(run / "events.jsonl") if event.kind == "stage"]
    assert [(event.step, event.facts["name"]) for event in found] == [(0, "small"), (5, "head"), (10, "whole")]
    small, head, whole = (event.facts for event in found)
    assert (small["image_size"], small["batch_size"], small["data_fraction"], small["frozen"]) == (6, 128, 0.5, [])
    frozen = head["frozen"]
    assert isinstance(frozen, list)
    assert "backbone.blocks.0.attn.qkv.weight" in frozen
    assert not any(name.startswith("head.") for name in frozen)
    assert whole["frozen"] == []


def test_a_frozen_backbone_is_the_same_before_and_after_its_stage(run: Path) -> None:
    before, after = (
        read_checkpoint(find_checkpoints(run / "checkpoints")[step], torch.device("cpu")).method for step in (5, 10)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.linear.weight", "head.linear.bias"}


def test_averaged_weights_are_scored_beside_the_others_and_can_be_used(run: Path) -> None:
    last = list(read_rows(run / "metrics.jsonl"))[-1].values
    assert last["val/loss"] != last["val_ema/loss"]
    for weights, prefix in (("raw", "val"), ("ema", "val_ema")):
        report = evaluate_run(run, weights=weights)["accuracy"]  # type: ignore[arg-type]  # a loop over both choices
        assert report.as_dict()["top1"] == last[f"{prefix}/top1"]
    raw, averaged = (opsin.load(run, weights=weights) for weights in ("raw", "ema"))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(raw(images), averaged(images))
    (newest,) = list(find_checkpoints(run / "checkpoints").values())[-1:]
    assert torch.equal(opsin.load(newest, weights="ema")(images), averaged(images))


def test_weights_that_were_never_averaged_cannot_be_asked_for(tmp_path: Path) -> None:
    train_digits(tmp_path / "run", "epochs=0.2")
    with pytest.raises(ConfigError, match=r"holds no averaged weights; use --weights raw, or train with ema.decay"):
        opsin.load(tmp_path / "run", weights="ema")


def test_every_step_tells_where_its_time_went(run: Path) -> None:
    rows = list(read_rows(run / "metrics.jsonl"))
    for row in rows:
        parts = [row.values[f"time/{name}_ms"] for name in ("data", "forward", "backward", "optimizer")]
        assert all(part > 0 for part in parts)
    whole = [
        sum(row.values[f"time/{name}_ms"] for name in ("data", "forward", "backward", "optimizer")) for row in rows
    ]
    assert sum(whole) / 1000 <= rows[-1].time_s * len(rows), "the parts are of one step"


def test_a_run_that_ended_where_a_stage_begins_goes_on_with_that_stage(tmp_path: Path) -> None:
    stages = ("stages=[{name: one, epochs: 1}, {name: two, epochs: 1, train: [head.*]}]", "epochs=null")
    train_digits(tmp_path / "run", *stages, "limits.steps=5")
    resume_run(tmp_path / "run", ["limits.steps=null"], quiet=True)
    found = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event.kind == "stage"]
    assert [(event.step, event.facts["name"]) for event in found] == [(0, "one"), (5, "two")]
    train_digits(tmp_path / "whole", *stages)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_averaging_may_begin_with_a_resume(tmp_path: Path) -> None:
    train_digits(tmp_path / "run", "limits.steps=5")
    resume_run(tmp_path / "run", ["limits.steps=null", "ema.decay=0.9", "ema.warmup=false"], quiet=True)
    last = list(read_rows(tmp_path / "run" / "metrics.jsonl"))[-1].values
    assert last["val_ema/loss"] > last["val/loss"], "the average lags behind while the loss falls"
    assert (tmp_path / "run" / "model_ema.safetensors").exists()


def test_a_warm_up_that_fills_a_stage_is_refused(tmp_path: Path) -> None:
    keys = ("stages=[{epochs: 1}]", "epochs=null", "optim.schedule={name: cosine, over: stage, warmup_epochs: 2}")
    with pytest.raises(ConfigError, match=r"warmup_epochs=2: stage 1 has 1 epochs, all of it warm-up"):
        train_digits(tmp_path / "run", *keys)


def test_a_warm_up_of_a_level_that_fills_a_stage_is_refused(tmp_path: Path) -> None:
    schedules = "[{name: constant}, {name: linear, over: stage, warmup_epochs: 1}]"
    keys = ("stages=[{epochs: 2}, {epochs: 1}]", "epochs=null", f"method.level_schedules={schedules}")
    message = r"method\.level_schedules\.1\.warmup_epochs=1: stage 2 has 1 epochs, all of it warm-up"
    with pytest.raises(ConfigError, match=message):
        train_recipe(read("hjepa-digits", keys), tmp_path / "run", name="levels", quiet=True)
