"""Looking never touches: with every monitor and evaluator there is, or none, the weights are the same bits."""

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsin.reporting.journal import read_rows
from opsin.settings.family import Family
from opsin.training.evaluator import EvaluatorConfig
from opsin.training.monitor import MonitorConfig
from tests.digits_run import SMALL_VIT, train_digits

for _package in ("opsin.evaluation", "opsin.monitors"):
    if find_spec(_package) is not None:
        for _module in pkgutil.iter_modules(import_module(_package).__path__):
            import_module(f"{_package}.{_module.name}")

KINDS: dict[str, type[Family]] = {"monitors": MonitorConfig, "evaluators": EvaluatorConfig}
EVERYTHING = [
    f"{key}.{name}.{setting}"
    for key, family in KINDS.items()
    for name, member in family.members().items()
    if member.__module__.startswith("opsin.")
    for setting in (f"name={name}", "every=1 step")
]
UNWATCHED = (*(f"monitors.{name}=null" for name in MonitorConfig.members()), "evaluators.val=null", "log.every=1000")
TEACHER = (
    "method.name=dino",
    "method.prototypes=64",
    "method.hidden=32",
    "method.bottleneck=16",
    "method.views.local_count=2",
    "checkpoints.best=null",
)
PREDICTOR = (
    "method.name=ijepa",
    "method.predictor_depth=1",
    "method.masks.min_context=2",
    "model.patch=2",
    "model.class_token=false",
    "model.pool=mean",
    "model.drop_path=0.2",
    "checkpoints.best=null",
)
# Dropout draws from torch's generator and batch norm keeps statistics: what a careless observer would disturb.
NETWORKS = {
    "vit": (*SMALL_VIT, "model.dropout=0.1"),
    "convnet": ("model.name=convnet", "model.widths=[4,4,4]", "data.image_size=16"),
}


@pytest.mark.usefixtures("torch_switches")
@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_that_is_watched_learns_the_same(network: str, tmp_path: Path) -> None:
    model = NETWORKS[network]
    # A network of convolutions has no attention to draw maps of.
    everything = [key for key in EVERYTHING if network == "vit" or not key.startswith("evaluators.maps.")]
    train_digits(tmp_path / "watched", "epochs=1", *everything, model=model)
    train_digits(tmp_path / "alone", "epochs=1", *UNWATCHED, model=model)
    assert_equal_weights(tmp_path)
    assert "accuracy/top1" in seen_in(tmp_path / "watched")


@pytest.mark.usefixtures("torch_switches")
def test_a_teacher_that_is_watched_teaches_the_same(tmp_path: Path) -> None:
    monitors = [key for key in EVERYTHING if key.startswith("monitors.")]
    train_digits(tmp_path / "watched", "epochs=1", *TEACHER, "evaluators.val=null", *monitors)
    train_digits(tmp_path / "alone", "epochs=1", *TEACHER, *UNWATCHED)
    assert_equal_weights(tmp_path)
    assert {"collapse/cosine", "collapse/student_rank", "gradients/student_head_q50"} <= seen_in(tmp_path / "watched")
    assert not {name for name in seen_in(tmp_path / "alone") if name.startswith(("collapse/", "system/"))}


@pytest.mark.usefixtures("torch_switches")
def test_a_predictor_that_is_watched_learns_the_same(tmp_path: Path) -> None:
    observers = [key for key in EVERYTHING if not key.startswith("evaluators.accuracy.")]
    train_digits(tmp_path / "watched", "epochs=1", *PREDICTOR, "evaluators.val=null", *observers)
    train_digits(tmp_path / "alone", "epochs=1", *PREDICTOR, *UNWATCHED)
    assert_equal_weights(tmp_path)
    assert {"maps/error_0", "maps/attention_spread", "knn/top1"} <= seen_in(tmp_path / "watched")


def assert_equal_weights(folder: Path) -> None:
    watched, alone = (load_file(folder / name / "model.safetensors") for name in ("watched", "alone"))
    assert watched.keys() == alone.keys()
    assert all(torch.equal(watched[name], alone[name]) for name in alone)


def seen_in(run: Path) -> set[str]:
    return {name for row in read_rows(run / "metrics.jsonl") for name in row.values}
