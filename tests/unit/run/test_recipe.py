"""The shipped recipes, and what the recipe of a run promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from opsin.errors import ConfigError
from opsin.run.recipe import Draft, read, read_draft, shipped
from opsin.settings.text import json_schema, to_yaml

SHIPPED = sorted(path.stem for path in shipped.glob("*.yaml"))
each_recipe = pytest.mark.parametrize("name", SHIPPED)


@each_recipe
def test_a_shipped_recipe_is_valid_and_survives_being_written(name: str, tmp_path: Path) -> None:
    recipe = read_draft(name)
    for comments in (True, False):
        path = tmp_path / f"{comments}.yaml"
        path.write_text(to_yaml(recipe, comments=comments))
        assert read_draft(str(path)) == recipe


@each_recipe
def test_the_schema_accepts_a_shipped_recipe_as_it_is_written(name: str) -> None:
    document = YAML(typ="safe").load((shipped / f"{name}.yaml").read_text())
    assert misfits(json_schema(Draft), document) == []


@each_recipe
def test_the_schema_accepts_the_whole_effective_recipe(name: str) -> None:
    document = YAML(typ="safe").load(to_yaml(read_draft(name), comments=False))
    assert misfits(json_schema(Draft), document) == []


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"epoch": 3}, "epoch"),
        ({"epochs": "three"}, "epochs"),
        ({"epochs": 0}, "epochs"),
        ({"precision": "fp8"}, "precision"),
        ({"data": {"path": "digits", "image_size": 8, "flip": True}}, "data.flip"),
        ({"model": {"name": "vit", "wide": 3}}, "model"),
        ({"optim": {"name": "adam"}}, "optim"),
    ],
)
def test_the_schema_refuses_what_a_recipe_cannot_hold(document: dict[str, Any], place: str) -> None:
    assert [fault.partition(":")[0] for fault in misfits(json_schema(Draft), document)] == [place]


def test_every_key_of_the_schema_is_explained() -> None:
    schema = json_schema(Draft)
    groups: dict[str, Any] = schema["$defs"]  # type: ignore[assignment]
    silent = [
        f"{group}.{key}"
        for group, facts in {"": schema, **groups}.items()
        for key, field in facts["properties"].items()
        # A group that says the same in its class has its description there.
        if "description" not in field and "description" not in groups[field["$ref"].rpartition("/")[2]]
    ]
    assert silent == []


def test_a_recipe_that_extends_another_may_give_any_part_of_a_group() -> None:
    document = {"extends": "cifar10-vit", "data": {"workers": 0}, "optim": {"schedule": {"warmup_epochs": 2}}}
    assert misfits(json_schema(Draft), document) == []


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read("quickstart").seed = 1  # type: ignore[misc]


def test_overrides_stand_above_the_recipe() -> None:
    recipe = read("quickstart", ["optim.lr=0.5", "optim.schedule.name=linear", "evaluators.val=null"])
    assert recipe.optim.lr == 0.5
    assert recipe.optim.schedule.warmup_epochs == 0.0, "another schedule starts from its own defaults"
    assert recipe.evaluators == {}


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read("quickstart", ["epoch=3", "optim.lr=-1", "data.workers=many"])
    assert len(caught.value.faults) == 3


TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, limit: value >= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "minItems": lambda value, limit: len(value) >= limit,
    "maxItems": lambda value, limit: len(value) <= limit,
}


def misfits(schema: Any, value: Any, place: str = "", root: Any = None) -> list[str]:
    """Every place where `value` breaks `schema`: the part of JSON Schema that pydantic uses for recipes."""
    root = root or schema
    if "$ref" in schema:
        target = root
        for name in schema["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        schema = {**target, **{key: rule for key, rule in schema.items() if key != "$ref"}}
    if "anyOf" in schema and all(misfits(choice, value, place, root) for choice in schema["anyOf"]):
        return [f"{place}: {value!r} fits no choice"]
    return [f"{place}: {fault}" for fault in _own_faults(schema, value)] + _inner_faults(schema, value, place, root)


def _own_faults(schema: Any, value: Any) -> list[str]:
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{value!r} is no {kind}"]
    faults = []
    if "enum" in schema and value not in schema["enum"]:
        faults.append(f"{value!r} is not in {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        faults.append(f"{value!r} is not {schema['const']!r}")
    if "not" in schema and value in schema["not"]["enum"]:
        faults.append(f"{value!r} is taken")
    broken = [name for name, holds in LIMITS.items() if name in schema and not holds(value, schema[name])]
    return faults + [f"{value!r}: {name}" for name in broken]


def _inner_faults(schema: Any, value: Any, place: str, root: Any) -> list[str]:
    faults: list[str] = []
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, item in value.items():
            inner = f"{place}.{key}".lstrip(".")
            rule = known.get(key, others)
            if rule is False:
                faults.append(f"{inner}: unknown key")
            elif rule is not True:
                faults += misfits(rule, item, inner, root)
    if isinstance(value, list):
        first = schema.get("prefixItems", ())
        rules = [*first, *[schema.get("items", {})] * (len(value) - len(first))]
        for index, (rule, item) in enumerate(zip(rules, value, strict=False)):
            faults += misfits(rule, item, f"{place}.{index}", root) if isinstance(rule, dict) else []
    return faults


def test_a_recipe_with_numbers_is_no_draft() -> None:
    assert read_draft("quickstart").open_keys == ()
    assert read_draft("folder").open_keys == ("model.name", "data.image_size", "batch_size", "epochs")
    assert read_draft("folder", ["batch_size=8", "model.name=resnet18"]).open_keys == ("data.image_size", "epochs")


def test_a_command_that_needs_numbers_refuses_a_draft() -> None:
    with pytest.raises(ConfigError, match=r"data.image_size=auto, batch_size=auto: .* plan folder --write"):
        read("folder", ["epochs=3", "model.name=convnet"])


def test_chosen_keys_lie_under_what_was_written_above_the_word_auto(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: folder\noptim.lr: 0.5\n")
    chosen = ["model.name=convnet", "data.image_size=32", "batch_size=8", "epochs=2", "optim.lr=0.25"]
    assert read(str(own), ["epochs=7"], chosen).optim.lr == 0.5
    assert read(str(own), ["epochs=7"], chosen).epochs == 7
    # The command line gives a word again: what was chosen lies over it.
    assert read(str(own), ["epochs=auto"], chosen).epochs == 2
