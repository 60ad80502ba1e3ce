"""Recipes laid over each other, and families of settings."""

import gc
from pathlib import Path
from typing import Literal

import pytest

from opsin.settings.family import Family, keys
from opsin.settings.layers import read
from tests.unit.settings.sample_recipe import (
    Dino,
    Knn,
    Linear,
    MethodConfig,
    Optim,
    Own,
    Plain,
    Recipe,
    Stage,
    Wave,
    Zoo,
    load,
    write,
)


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "# nothing\n")) == Recipe()


def test_the_command_line_wins_over_the_file_and_the_file_over_what_it_extends(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\nepochs: 1\noptim: {lr: 1, nesterov: true}\n", "shipped/base.yaml")
    recipe = load(write(tmp_path, "extends: base\nepochs: 2\noptim:\n  lr: 2\n"), "optim.lr=3", "optim.betas=[0.5, 1]")
    assert recipe == Recipe(seed=1, epochs=2, optim=Optim(lr=3, nesterov=True, betas=(0.5, 1.0)))


def test_extends_takes_a_path_relative_to_the_file_and_chains(tmp_path: Path) -> None:
    write(tmp_path, "seed: 4\n", "a/first.yaml")
    write(tmp_path, "extends: ../a/first.yaml\nepochs: 5\n", "b/second.yaml")
    recipe = load(write(tmp_path, "extends: b/second.yaml\n"))
    assert (recipe.seed, recipe.epochs) == (4, 5)


def test_a_shipped_recipe_is_read_by_its_name(tmp_path: Path) -> None:
    write(tmp_path, "seed: 9\n", "nine.yaml")
    assert read("nine", [], Recipe, shipped=tmp_path).seed == 9


def test_keys_may_be_dotted_or_nested_or_both(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, "optim.lr: 2\noptim:\n  nesterov: true\nmethod.label_smoothing: 0.3\n"))
    assert recipe == Recipe(optim=Optim(lr=2, nesterov=True), method=Plain(label_smoothing=0.3))


def test_values_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, "optim: {lr: 5e-4}\ntitle: on\n"), "path=../x", "optim.clip=null", "title=2024-01-01")
    assert recipe.optim.lr == 0.0005
    assert recipe.title == "2024-01-01"
    assert recipe.path == Path("../x")
    assert recipe.optim.clip is None


def test_part_of_a_group_keeps_the_rest_of_its_default(tmp_path: Path) -> None:
    assert load(write(tmp_path, "optim: {nesterov: true}\n")).optim == Optim(lr=0.5, nesterov=True)


def test_one_entry_of_a_list_is_changed_by_its_index(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, "stages:\n- epochs: 1\n  train: [head]\n- epochs: 2\n"), "stages.0.epochs=7")
    assert recipe.stages == [Stage(epochs=7, train=["head"]), Stage(epochs=2)]


def test_a_table_grows_and_null_takes_an_entry_out(tmp_path: Path) -> None:
    path = write(tmp_path, "evaluators:\n  linear: {every: 3}\n  best: {name: knn, k: 2}\n")
    assert load(path).evaluators == {"knn": Knn(k=5), "linear": Linear(every=3), "best": Knn(k=2)}
    assert load(path, "evaluators.knn=null", "evaluators.linear.every=4").evaluators == {
        "linear": Linear(every=4),
        "best": Knn(k=2),
    }


def test_without_a_name_the_default_member_is_meant(tmp_path: Path) -> None:
    assert load(write(tmp_path, "method: {weights: a.pt}\n")).method == Plain(label_smoothing=0.1, weights="a.pt")
    assert load(write(tmp_path, "method: {name: dino, shape: {warmup: 2}}\n")).method == Dino(
        shape=Wave(end=0.5, warmup=2)
    )


def test_a_family_switch_drops_the_keys_of_lower_layers(tmp_path: Path) -> None:
    path = write(tmp_path, "method: {name: dino, teacher_temp: 0.07, weights: a.pt}\n")
    assert load(path, "method.label_smoothing=0.2", "method.name=supervised").method == Plain(label_smoothing=0.2)
    assert load(path, "method.name=dino").method == Dino(teacher_temp=0.07, weights="a.pt")


def test_the_member_with_a_free_name_takes_every_other_name(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {name: convnext_tiny, pooling: max}\n")
    assert load(path).model == Zoo(name="convnext_tiny", pooling="max")
    assert load(path, "model.name=resnet18").model == Zoo(name="resnet18", pooling="max")
    assert load(path, "model.name=own").model == Own()


def test_an_optional_family_may_be_null(tmp_path: Path) -> None:
    assert load(write(tmp_path, "shape: {name: wave, end: 1}\n")).shape == Wave(end=1.0)
    assert load(write(tmp_path, "shape: {name: wave, end: 1}\n"), "shape=null").shape is None


def test_a_member_defined_after_the_recipe_is_accepted(tmp_path: Path) -> None:
    class Mine(MethodConfig):
        name: Literal["mine"] = "mine"
        power: int = 2

        def build(self) -> str:
            return "mine"

    try:
        assert load(write(tmp_path, "method: {name: mine, power: 3}\n")).method == Mine(power=3)
        assert Recipe(method=Mine()).model_dump()["method"] == {"name": "mine", "weights": None, "power": 2}
        assert "method.power" in keys(Recipe)
        assert list(MethodConfig.members()) == ["dino", "mine", "supervised"]
    finally:
        del Mine
        gc.collect()


def test_two_classes_cannot_share_a_name() -> None:
    class Root(Family):
        pass

    class One(Root):
        name: Literal["same"] = "same"

    class Two(Root):
        name: Literal["same"] = "same"

    with pytest.raises(TypeError, match=r"One and .*Two are both the root 'same'; rename one"):
        Root.members()


def test_a_family_root_is_not_a_value() -> None:
    with pytest.raises(TypeError, match="abstract"):
        MethodConfig(name="dino")  # type: ignore[abstract]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Optim().lr = 1.0  # type: ignore[misc]
