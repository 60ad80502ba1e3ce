"""`opsin tune lr`: what it writes, and that a run never sees it."""

import csv
import hashlib
import json
from contextlib import suppress
from pathlib import Path

import pytest

from opsin.errors import RunError, TrainingError
from opsin.run.lr_curve import sweep_rates
from opsin.run.recipe import read
from opsin.settings.text import to_yaml
from opsin.tuning.lr import tune_lr
from tests.conftest import RunOpsin
from tests.digits_run import OVERRIDES, train_digits
from tests.unit.run.sweeps import KEYS, SGD, STEPS, small

pytestmark = pytest.mark.usefixtures("torch_switches")

# --- what is written ------------------------------------------------------------------------------


def test_a_sweep_writes_its_curve_a_picture_and_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "lr"
    keys = [*KEYS, 'data.cache=a b"c', "evaluators={val: null}", "optim.betas=[0.9, 0.95]"]
    found = tune_lr("quickstart", keys, out=out, steps=STEPS, quiet=True)
    assert found.suggestion is not None
    assert sorted(path.name for path in out.iterdir()) == ["lr.csv", "lr.json", "lr.png", "tuned.yaml"]
    rows = list(csv.DictReader((out / "lr.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(len(rows)))
    assert [float(row["lr"]) for row in rows] == pytest.approx(sweep_rates(1e-5, 1.0, STEPS)[: len(rows)], rel=1e-5)
    assert (out / "lr.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "lr.json").read_text())
    assert (result["rates"], result["reason"]) == ({"lr": found.suggestion}, found.reason)
    assert read(str(out / "tuned.yaml")) == read("quickstart", [*keys, f"optim.lr={found.suggestion}"])


def test_a_tuned_recipe_extends_a_file_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(to_yaml(small(), comments=False))
    found = tune_lr("mine.yaml", steps=STEPS, quiet=True)
    monkeypatch.chdir("/")
    tuned = read(str(tmp_path / "runs" / "mine-lr" / "tuned.yaml"))
    assert tuned == read(str(tmp_path / "mine.yaml"), [f"optim.lr={found.suggestion}"])


def test_no_recipe_is_written_without_a_usable_slope(tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text("of an earlier sweep")
    with pytest.raises(TrainingError, match=r"^quickstart: no learning rate found: the loss never falls clearly"):
        tune_lr("quickstart", KEYS, out=tmp_path, first=1e-9, last=1e-8, steps=30, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr.csv", "lr.json", "lr.png"]
    assert json.loads((tmp_path / "lr.json").read_text())["rates"] == {}


def test_a_sweep_that_diverges_at_once_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"runs away as soon as the sweep begins, at 1e\+06: begin lower"):
        tune_lr("quickstart", [*KEYS, *SGD], out=tmp_path, first=1e6, last=1e9, steps=30, quiet=True)
    assert not (tmp_path / "tuned.yaml").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("of a run")
    with pytest.raises(RunError, match=r"holds other files \(recipe.yaml\)"):
        tune_lr("quickstart", KEYS, out=tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


# --- no trace -------------------------------------------------------------------------------------


def first_steps(out: Path) -> str:
    """The hash of the weights after twenty updates of a network with dropout."""
    train_digits(out, "limits.steps=20", "log.plots=false", model=("model.width=16", "model.depth=2", "model.heads=2"))
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def test_a_sweep_leaves_no_trace_in_a_run(tmp_path: Path, run_opsin: RunOpsin) -> None:
    model = ["model.width=16", "model.depth=2", "model.heads=2"]
    before = first_steps(tmp_path / "before")
    with suppress(TrainingError):  # whether the curve is usable does not matter here
        tune_lr("quickstart", [*OVERRIDES, *model], out=tmp_path / "here", steps=30, quiet=True)
    assert (tmp_path / "here" / "lr.json").exists()
    assert first_steps(tmp_path / "after one in this process") == before
    run_opsin("tune", "lr", "quickstart", *OVERRIDES, *model, "--steps=30", "--quiet", "--out", "there")
    assert (tmp_path / "there" / "lr.json").exists()
    assert first_steps(tmp_path / "after one in another process") == before
