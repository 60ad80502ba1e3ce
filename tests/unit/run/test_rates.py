"""`optim.lr=auto`: one sweep for a recipe, whose rates the run trains with as if they had been given."""

from pathlib import Path

import pytest

from opsin.commands.main import main
from opsin.commands.verify import digest
from opsin.errors import ConfigError, DataError, OpsinError, TrainingError
from opsin.processes.trail import VARIABLE, LastActivity, follow
from opsin.run.rates import find_rates
from opsin.run.recipe import read
from opsin.run.session import train_recipe
from opsin.settings.text import to_yaml
from opsin.storage.directory import RunDirectory
from opsin.storage.teller import Silence
from tests.cli.commands import pictures
from tests.story import Story
from tests.unit.data.pictures import png
from tests.unit.run.sweeps import SGD, small

pytestmark = pytest.mark.usefixtures("torch_switches")


def test_a_search_runs_once_for_a_recipe(tmp_path: Path) -> None:
    folder, story = tmp_path / "run-lr", Story()
    found = find_rates(small("optim.lr=auto"), folder, name="mine", teller=story)
    assert 1e-4 < found["lr"] < 0.1
    assert read(str(folder / "tuned.yaml")) == small(f"optim.lr={found['lr']}")
    written = (folder / "lr.json").stat().st_mtime_ns
    again = small("optim.lr=auto", "log.every=7", "limits.steps=3")
    assert find_rates(again, folder, name="mine", teller=story) == found
    assert (folder / "lr.json").stat().st_mtime_ns == written
    assert story.notices == [
        f"optim.lr=auto: sweeping the learning rate first ({folder})",
        f"optim.lr=auto: lr={found['lr']:g}",
        f"optim.lr=auto: lr={found['lr']:g}, found before ({folder})",
    ]


@pytest.mark.parametrize("optimizer", [SGD, ("optim.name=muon", "optim.other_lr=0.05")], ids=["sgd", "muon"])
def test_a_run_after_its_own_sweep_has_the_bits_of_one_with_the_rate_by_hand(
    optimizer: tuple[str, ...], tmp_path: Path
) -> None:
    keys = (*optimizer, "limits.steps=10")
    train_recipe(small(*keys, "optim.lr=auto"), tmp_path / "auto", name="auto", quiet=True)
    found = read(str(tmp_path / "auto" / "recipe.yaml")).optim
    rates = [f"optim.{name}={value}" for name, value in found if name in ("lr", "other_lr")]
    train_recipe(small(*keys, *rates), tmp_path / "by hand", name="by hand", quiet=True)
    assert digest(RunDirectory(tmp_path / "auto")) == digest(RunDirectory(tmp_path / "by hand"))


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a supervisor."""
    folder = tmp_path / "trail"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.mark.parametrize(
    ("keys", "kind", "fault", "is_final"),
    [
        (("data.path=nowhere",), DataError, "nowhere: ", False),
        (("batch_size=100000",), ConfigError, "batch_size=100000: ", False),
        (("data.path=same", "batch_size=8"), TrainingError, "mine: no learning rate found: the loss never fa", True),
    ],
    ids=["no data", "no batch", "no slope"],
)
def test_a_search_that_finds_nothing_says_why_and_whether_another_may(
    keys: tuple[str, ...],
    kind: type[OpsinError],
    fault: str,
    is_final: bool,
    tmp_path: Path,
    trail: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in pictures(tmp_path / "same").rglob("*.png"):
        path.write_bytes(png(0))  # of both classes: nothing can be learned
    recipe = small(*SGD, *keys, "optim.lr=auto")
    with pytest.raises(kind, match=f"^optim.lr=auto: {fault}"):
        find_rates(recipe, tmp_path / "lr", name="mine", teller=Silence())
    assert follow(trail) == LastActivity(), "the sweep is not part of the run"
    (tmp_path / "mine.yaml").write_text(to_yaml(recipe, comments=False))
    assert main(["train", "mine.yaml", "--out", "run", "--quiet"]) == kind.exit_status
    assert (follow(trail).verdict is not None) == is_final
    assert not (tmp_path / "run").exists()


def test_a_damaged_result_is_no_result(tmp_path: Path) -> None:
    recipe = small("optim.lr=auto", f"data.path={tmp_path}/nowhere")
    (tmp_path / "lr").mkdir()
    for text in ("", "[]", "{}", '{"key": 1, "rates": {"lr": 1}}'):
        (tmp_path / "lr" / "lr.json").write_text(text)
        with pytest.raises(DataError, match="nowhere"):
            find_rates(recipe, tmp_path / "lr", name="mine", teller=Silence())
