"""The plan of a run: its steps and bytes are those of the run itself; its times add up."""

import json
from pathlib import Path

import pytest

from opsin.commands.main import main
from opsin.run.pace import measure_pace
from opsin.run.plan import plan_run
from opsin.run.recipe import read
from tests.digits_run import CONVNET, OVERRIDES, SMALL_VIT, train_digits
from tests.story import Calm

pytestmark = pytest.mark.usefixtures("torch_switches", "short_measurements")
STAGES = "stages=[{epochs: 1, image_size: 4, batch_size: 64}, {epochs: 2}]"


@pytest.fixture
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.run.plan._SECONDS", 0.05)


def test_a_plan_has_the_stages_and_steps_of_the_run(tmp_path: Path) -> None:
    keys = [*OVERRIDES, *SMALL_VIT, "model.patch=2", "epochs=null", STAGES]
    plan = plan_run(read("quickstart", keys), Calm())
    assert [(stage.image_size, stage.batch_size, stage.epochs) for stage in plan.stages] == [(4, 64, 1), (8, 256, 2)]
    run = train_digits(tmp_path / "run", "model.patch=2", "epochs=null", STAGES)
    assert [stage.steps for stage in plan.stages] == [stage.steps for stage in run.agenda.timeline.stages]
    for stage in plan.stages:
        assert stage.seconds == pytest.approx(stage.steps * stage.batch_size / stage.images_per_s)
    assert plan.seconds == pytest.approx(plan.start_s + plan.scores_s + sum(stage.seconds for stage in plan.stages))


def test_a_limit_of_steps_shortens_the_plan() -> None:
    keys = [*OVERRIDES, *SMALL_VIT, "epochs=null", STAGES, "model.patch=2", "limits.steps=24"]
    plan = plan_run(read("quickstart", keys), Calm())
    assert [stage.steps for stage in plan.stages] == [22, 2]
    assert [round(stage.epochs, 3) for stage in plan.stages] == [1, 0.4]


@pytest.mark.parametrize("keys", [SMALL_VIT, (*CONVNET, "optim.name=muon", "ema.decay=0.9")], ids=["vit", "ema"])
def test_the_bytes_of_a_checkpoint_are_foreseen(keys: tuple[str, ...], tmp_path: Path) -> None:
    pace = measure_pace(read("quickstart", [*OVERRIDES, *keys]), 0.01)
    train_digits(tmp_path / "run", model=keys)
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    stored = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    # Names and shapes take some kilobytes beside the numbers.
    assert pace.state_bytes <= stored <= pace.state_bytes + 60_000


def test_the_command_prints_a_plan_and_writes_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [*OVERRIDES, *SMALL_VIT]
    assert main(["plan", "quickstart", *keys, "--write", str(tmp_path / "mine.yaml"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [stage["steps"] for stage in answer["stages"]] == [10]
    assert answer["seconds"] > 0
    assert read(str(tmp_path / "mine.yaml")) == read("quickstart", keys)
    assert main(["plan", "quickstart", *keys]) == 0
    assert "10" in capsys.readouterr().out.splitlines()[1].split()
