"""Looking never touches: with every monitor and evaluator there is, or none, the weights are the same bits."""

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsin.reporting import read_rows
from opsin.training.observe import EvaluatorConfig, MonitorConfig
from tests.digits_run import SMALL_VIT, train_digits

for _package in ("opsin.evaluation", "opsin.monitors"):
    if find_spec(_package) is not None:
        for _module in pkgutil.iter_modules(import_module(_package).__path__):
            import_module(f"{_package}.{_module.name}")

KINDS = {"monitors": MonitorConfig, "evaluators": EvaluatorConfig}
EVERYTHING = [
    f"{key}.{name}.{setting}"
    for key, family in KINDS.items()
    for name, member in family.members().items()
    if member.__module__.startswith("opsin.")
    for setting in (f"name={name}", "every=1 step")
]
# Dropout draws from torch's generator and batch norm keeps statistics: what a careless observer would disturb.
NETWORKS = {
    "vit": (*SMALL_VIT, "model.dropout=0.1"),
    "convnet": ("model.name=convnet", "model.widths=[4,4,4]", "data.image_size=16"),
}


@pytest.mark.usefixtures("torch_switches")
@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_that_is_watched_learns_the_same(network: str, tmp_path: Path) -> None:
    model = NETWORKS[network]
    train_digits(tmp_path / "watched", "epochs=1", *EVERYTHING, model=model)
    train_digits(tmp_path / "alone", "epochs=1", "evaluators.val=null", "log.every=1000", model=model)
    watched, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("watched", "alone"))
    assert watched.keys() == alone.keys()
    assert all(torch.equal(watched[name], alone[name]) for name in alone)
    seen = {name for row in read_rows(tmp_path / "watched" / "metrics.jsonl") for name in row.values}
    assert "accuracy/top1" in seen
