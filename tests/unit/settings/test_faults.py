"""Each fault of a recipe is one line: location, key, value, rule, way out; all of them at once."""

from pathlib import Path

import pytest

from opsin.errors import ConfigError
from opsin.run.recipe import read as read_recipe
from opsin.settings.layers import read
from tests.unit.settings.sample_recipe import Bare, Optim, Recipe, faults, load, write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr: -1", "optim.lr: -1 is out of range; must be greater than 0"),
        ("optim: {lr: high}", "optim.lr: 'high' is text; must be a number"),
        ("optim: {lr: .inf}", "optim.lr: Infinity is not finite; must be a finite number"),
        ("optim: {nesterov: yes}", "optim.nesterov: 'yes' is text; must be true or false"),
        ("optim: {nesterov: 1}", "optim.nesterov: 1 is a number; must be true or false"),
        ("optim: {betas: [0.9]}", "optim.betas.1: missing; the list ends after 1"),
        ("optim: {betas: [0.9, x]}", "optim.betas.1: 'x' is text; must be a number"),
        ("optim: 3", "optim: 3 is a number; must be a group of keys"),
        ("method: dino", "method: 'dino' is text; must be a group of keys, such as method.name=dino"),
        ('epochs: "5"', "epochs: '5' is text; must be a whole number"),
        ("epochs: 1.5", "epochs: 1.5 is a fraction; must be a whole number"),
        ("epochs: true", "epochs: true is a truth value; must be a whole number"),
        ("epochs: null", "epochs: null is not allowed; must be a whole number"),
        ("title: 5", "title: 5 is a number; must be text"),
        ("device: gpu", "device: 'gpu' does not fit; must be text like ^(cpu|cuda)$"),
        ("stages: 5", "stages: 5 is a number; must be a list"),
        ("precision: bf61", "precision: 'bf61' is not an option; must be 'auto', 'fp32' or 'bf16'; did you mean bf16?"),
        ("workers: many", "workers: 'many' is not an option; must be a whole number or 'auto'"),
        ("workers: 1.5", "workers: 1.5 is a fraction; must be a whole number or 'auto'"),
        ("epoch: 1", "epoch: unknown key; did you mean epochs?"),
        ("lr: 1", "lr: unknown key; did you mean optim.lr?"),
        ("optim.zzz: 1", "optim.zzz: unknown key; known here: lr, betas, nesterov, clip"),
        ("method: {name: dino, teacher_tmp: 1}", "method.teacher_tmp: unknown key; did you mean method.teacher_temp?"),
        ("method.teacher_temp: 1", "method.teacher_temp: is a key of method 'dino', not 'supervised'"),
        ("method.name: dina", "method.name: unknown method 'dina'; known: dino, supervised; did you mean dino?"),
        ("method.name: 3", "method.name: unknown method 3; known: dino, supervised"),
        ("shape: {warmup: 1}", "shape.name: missing; known: flat, wave"),
        ("evaluators.knn.k: 0", "evaluators.knn.k: 0 is out of range; must be greater than 0"),
        ("seed: 13", "13 is unlucky; choose another seed"),
    ],
)
def test_a_wrong_value_is_one_line_with_location_key_value_and_rule(tmp_path: Path, text: str, expected: str) -> None:
    location = "recipe.yaml" if expected.startswith("13") else "recipe.yaml:2"
    assert faults(write(tmp_path, f"# head\n{text}\n")) == [f"{location}: {expected}"]


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "epochs: 0\noptim:\n  lr: -1\nstages:\n- epochs: 1\n- epochs: 0\n- train: []\n")
    assert faults(path, "optim.nestrov=true", "seed", "evaluators.knn.every=often") == [
        "command line: 'seed' is not a setting; write key=value, such as data.path=images",
        "recipe.yaml:1: epochs: 0 is out of range; must be greater than 0",
        "recipe.yaml:3: optim.lr: -1 is out of range; must be greater than 0",
        "command line: optim.nestrov: unknown key; did you mean optim.nesterov?",
        "recipe.yaml:6: stages.1.epochs: 0 is out of range; must be greater than 0",
        "recipe.yaml:7: stages.2.epochs: missing; give it in the recipe or as stages.2.epochs=VALUE",
        "command line: evaluators.knn.every: 'often' is text; must be a whole number",
    ]


def test_a_required_group_that_is_missing_is_named_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, "model.depth: 3\n", "base.yaml")
    path = write(tmp_path, "extends: base\n")
    with pytest.raises(ConfigError) as caught:
        read(str(path), ["optim.train=[]", "model.depth=4"], Bare, shipped=tmp_path)
    assert caught.value.faults == (
        "command line: optim.epochs: missing; give it in the recipe or as optim.epochs=VALUE",
        "recipe.yaml: method.name: missing; known: dino, supervised",
    )


def test_the_location_is_the_file_that_gives_the_bad_value(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\n\nepochs: 0\noptim:\n  lr: 0\n", "shipped/base.yaml")
    path = write(tmp_path, "extends: base\noptim:\n  clip: wide\n")
    assert faults(path) == [
        "base.yaml:3: epochs: 0 is out of range; must be greater than 0",
        "base.yaml:5: optim.lr: 0 is out of range; must be greater than 0",
        "recipe.yaml:3: optim.clip: 'wide' is text; must be a number",
    ]
    assert load(path, "epochs=1", "optim.lr=1", "optim.clip=1").optim == Optim(lr=1, clip=1)


def test_a_key_given_twice_names_both_lines(tmp_path: Path) -> None:
    assert faults(write(tmp_path, "seed: 1\nepochs: 2\nseed: 3\n")) == [
        "recipe.yaml:3: seed: given twice; the first is at recipe.yaml:1"
    ]
    assert faults(write(tmp_path, "optim:\n  lr: 1\noptim.lr: 2\n")) == [
        "recipe.yaml:3: optim.lr: given twice; the first is at recipe.yaml:2"
    ]


def test_of_two_equal_overrides_the_last_counts(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "'seed' is not a setting; write key=value, such as data.path=images"),
        ("--seed=3", "'--seed=3' is not a setting; write key=value, such as data.path=images"),
        ("seed=", "seed: has no value; write seed=null for none or seed='\"\"' for empty text"),
        ("title=[1", "title: '[1' is not a YAML value; quote it: title='\"...\"'"),
        ("title=*.jpg", "title: '*.jpg' is not a YAML value; quote it: title='\"...\"'"),
    ],
)
def test_the_fault_of_a_malformed_override_shows_the_form(tmp_path: Path, override: str, expected: str) -> None:
    assert faults(write(tmp_path, ""), override) == [f"command line: {expected}"]


def test_the_fault_of_a_missing_recipe_lists_the_shipped_ones(tmp_path: Path) -> None:
    for name in ("quickstart", "cifar10-vit"):
        write(tmp_path, "seed: 1\n", f"shipped/{name}.yaml")
    with pytest.raises(ConfigError) as caught:
        read("quickstrt", ["seed"], Recipe, shipped=tmp_path / "shipped")
    assert caught.value.faults == (
        "command line: quickstrt: is neither a file nor a shipped recipe; shipped: cifar10-vit, quickstart; "
        "did you mean quickstart?",
        "command line: 'seed' is not a setting; write key=value, such as data.path=images",
    )


def test_extends_of_a_missing_recipe_names_its_line(tmp_path: Path) -> None:
    assert faults(write(tmp_path, "seed: 1\nextends: nowhere\n")) == [
        "recipe.yaml:2: extends: nowhere: is neither a file nor a shipped recipe; shipped: none"
    ]


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "# b\nextends: recipe.yaml\n", "b.yaml")
    assert faults(write(tmp_path, "extends: b.yaml\n")) == [
        "b.yaml:2: extends: circular: recipe.yaml -> b.yaml -> recipe.yaml; remove one"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1\n", 2),
        ("a:\n\tb: 1\n", 2),
        ("- 1\n", 1),
        ("a: *x\n", 1),
        ("a: !odd x\n", 1),
        ("? [a]\n: 1\n", 1),
        ("a: &x [*x]\n", 1),
    ],
)
def test_text_that_is_no_recipe_names_its_line(tmp_path: Path, text: str, line: int) -> None:
    (fault,) = faults(write(tmp_path, text))
    assert fault.startswith(f"recipe.yaml:{line}: ")
    assert "\n" not in fault


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert faults(path) == ["recipe.yaml: is not UTF-8 text; save it as UTF-8"]


def test_an_address_where_a_group_belongs_is_shown_without_its_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe("quickstart", ["backup=s3://AKIA:wJalr/XUt@bucket/runs"])
    assert "'s3://***@bucket/runs' is text; must be a group of keys" in str(caught.value)
