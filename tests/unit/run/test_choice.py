"""Keys that say `auto`: what is chosen, what stays, and that a run keeps its choice."""

import re
from pathlib import Path

import pytest

from opsin.commands.main import main
from opsin.run.choice import choose
from opsin.run.recipe import Recipe, read
from opsin.run.session import train_recipe
from opsin.run.sizes import SIZES
from opsin.settings.text import diff
from tests.story import Calm
from tests.unit.data.pictures import fill

pytestmark = pytest.mark.usefixtures("torch_switches", "short_measurements")

# Two seconds: measurements take a share of them.
SHORT = ("limits.minutes=0.03", "data.workers=0", "log.tensorboard=false", "log.plots=false", "device=cpu")


@pytest.fixture
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PROBE", "_FINAL"):
        monkeypatch.setattr(f"opsin.run.choice.{name}", (1 / 800, 0.1))


def folder(tmp_path: Path) -> str:
    return str(fill(tmp_path / "pictures", *(f"{name}/{number}.png" for name in "ab" for number in range(20))))


def size_of(recipe: Recipe) -> tuple[int, object]:
    return recipe.data.image_size, recipe.model.name


@pytest.mark.parametrize("name", ["folder", "dino-folder"])
def test_every_open_key_becomes_one_that_belongs_together(name: str, tmp_path: Path) -> None:
    story = Calm()
    recipe = choose(name, [f"data.path={folder(tmp_path)}", *SHORT], None, story)
    assert recipe.open_keys == ()
    assert size_of(recipe) in {(size.image_size, size.network["name"]) for size in SIZES[recipe.method.name]}
    assert recipe.epochs is not None
    assert 1 <= recipe.epochs <= 500
    assert recipe.batch_size == 32
    said = [line for line in story.notices if line.startswith("auto:")]
    assert len(said) == 2
    for part in ("0.03 minutes", f"{recipe.data.image_size} px", f"{recipe.epochs:g} epochs", "images/s; about"):
        assert part in said[1]


def test_small_pictures_are_not_enlarged_beyond_the_smallest_size(tmp_path: Path) -> None:
    # Pictures of 8 pixels, and time for the largest network.
    recipe = choose("folder", ["data.path=digits", "limits.minutes=600", "epochs=1", "device=cpu"], None, Calm())
    assert size_of(recipe) == (32, "convnet")


def test_a_key_with_a_value_stays_and_the_others_follow(tmp_path: Path) -> None:
    given = ["model.name=resnet10t", "data.image_size=40", "batch_size=5", f"data.path={folder(tmp_path)}"]
    recipe = choose("folder", [*given, *SHORT], None, Calm())
    assert (*size_of(recipe), recipe.batch_size) == (40, "resnet10t", 5)
    assert recipe.epochs is not None


def test_a_recipe_without_open_keys_is_measured_by_nobody() -> None:
    story = Calm()
    assert choose("quickstart", ["limits.minutes=5"], None, story) == read("quickstart", ["limits.minutes=5"])
    assert story.notices == []


def test_a_run_keeps_its_choice_and_what_was_changed_shows(tmp_path: Path) -> None:
    overrides = [f"data.path={folder(tmp_path)}", *SHORT]
    first = choose("folder", overrides, tmp_path / "run", Calm())
    train_recipe(first, tmp_path / "run", name="folder", quiet=True)
    story = Calm()
    again = choose("folder", [*overrides, "optim.lr=0.123"], tmp_path / "run", story)
    assert diff(first, again) == ["optim.lr: 0.05 -> 0.123"]
    assert story.notices == []


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (["method.name=ijepa"], "model.name=auto, .*: nothing to choose from for method.name=ijepa.*supervised, dino"),
        (["stages=[{epochs: 1}]"], "epochs=auto: cannot be chosen for a run with stages"),
        (["limits.minutes=0"], "limits.minutes: 0 "),
        (["limits.minutes=soon"], "limits.minutes: 'soon' "),
        (["data.path=nowhere"], "nowhere"),
    ],
)
def test_a_choice_that_cannot_be_made_is_one_line(
    keys: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "folder", f"data.path={folder(tmp_path)}", *keys, "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(fault, lines[0])
