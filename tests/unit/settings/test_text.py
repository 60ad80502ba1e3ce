"""Recipes as text that reads back as equal settings, and what is told about them."""

import json
import string
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsin.settings.family import keys
from opsin.settings.text import diff, head_comment, json_schema, shipped_recipes, to_yaml
from tests.unit.settings.sample_recipe import (
    Dino,
    Flat,
    Knn,
    Linear,
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


def test_the_effective_recipe_has_a_comment_for_each_key() -> None:
    text = to_yaml(
        Recipe(stages=[Stage(epochs=2, shape=Wave()), Stage(epochs=3)], evaluators={}), comments=True, head="One\n\nTwo"
    )
    lines = text.splitlines()
    assert lines[:4] == [
        "# One",
        "#",
        "# Two",
        "seed: 0                                   # Start of all random numbers.",
    ]
    assert "  label_smoothing: 0.1                    # Share of the target given to all classes." in lines
    assert "teacher_temp" not in text
    assert lines[lines.index("stages:") :] == [
        "stages:",
        "  - epochs: 2",
        "    train: []",
        "    shape:",
        "      name: wave                          # One of flat, wave.",
        "      warmup: 0.0",
        "      end: 0.0",
        "  - epochs: 3",
        "    train: []",
        "    shape: null",
        "evaluators:",
        "  knn: null",
    ]
    assert "#" not in to_yaml(Recipe(), comments=False)


_text = st.text(max_size=12) | st.sampled_from(
    ["null", "5", "on", "1e3", "a: b", "~", "#x", "...", "---", "\u2028", "é😀", "0x1"]
)
_number = st.floats(allow_nan=False, allow_infinity=False)
_positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
_shapes = st.one_of(st.builds(Flat), st.builds(Wave, end=_number, warmup=_positive))
_stages = st.builds(Stage, epochs=st.integers(1, 9), train=st.lists(_text, max_size=3), shape=st.none() | _shapes)
_names = st.text(string.ascii_letters + string.digits + "_- ", min_size=1, max_size=5)
_recipes = st.builds(
    Recipe,
    seed=st.integers().filter(lambda seed: seed != 13),
    workers=st.integers() | st.just("auto"),
    path=st.sampled_from([Path(), Path("a b"), Path("../x"), Path("~/y")]),
    title=_text,
    method=st.builds(Plain, weights=st.none() | _text) | st.builds(Dino, teacher_temp=_positive, shape=_shapes),
    model=st.builds(Own, depth=st.integers()) | st.builds(Zoo, name=_text.filter(lambda name: name != "own")),
    optim=st.builds(Optim, lr=_positive, betas=st.tuples(_number, _number), nesterov=st.booleans()),
    shape=st.none() | _shapes,
    stages=st.lists(_stages, max_size=3),
    evaluators=st.dictionaries(_names, st.one_of(st.builds(Knn), st.builds(Linear, every=st.integers())), max_size=3),
)


@given(recipe=_recipes, comments=st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_text_of_a_recipe_reads_back_as_an_equal_recipe(tmp_path: Path, recipe: Recipe, comments: bool) -> None:
    again = load(write(tmp_path, to_yaml(recipe, comments=comments, head="# Any")))
    assert again == recipe
    assert diff(recipe, again) == []


def test_diff_shows_each_key_that_differs() -> None:
    before = Recipe(optim=Optim(lr=0.1), stages=[Stage(epochs=1)], method=Plain(label_smoothing=0.1))
    after = Recipe(optim=Optim(lr=0.2, betas=(0, 1)), stages=[Stage(epochs=2)], method=Dino(shape=Flat()))
    assert diff(before, after) == [
        "method.name: supervised -> dino",
        "method.label_smoothing: 0.1 -> (none)",
        "optim.lr: 0.1 -> 0.2",
        "optim.betas: [0.9, 0.999] -> [0.0, 1.0]",
        "stages.0.epochs: 1 -> 2",
        "method.teacher_temp: (none) -> 0.04",
        "method.shape.name: (none) -> flat",
        "method.shape.warmup: (none) -> 0.0",
    ]


def test_keys_are_those_of_all_members() -> None:
    found = keys(Recipe)
    assert {"seed", "method.name", "method.label_smoothing", "method.teacher_temp", "method.shape.end"} <= set(found)
    assert {"model.depth", "model.pooling", "stages", "evaluators"} <= set(found)
    assert len(found) == len(set(found))


def test_the_json_schema_tells_members_apart_by_name() -> None:
    schema = json.loads(json.dumps(json_schema(Recipe)))
    method = schema["properties"]["method"]
    assert method["discriminator"]["propertyName"] == "name"
    assert [choice["properties"]["name"]["const"] for choice in method["anyOf"]] == ["dino", "supervised"]
    assert schema["properties"]["seed"]["description"] == "Start of all random numbers."
    assert schema["properties"]["model"]["anyOf"][1]["properties"]["name"]["not"] == {"enum": ["own"]}
    assert schema["additionalProperties"] is False
    assert "extends" in schema["properties"]


def test_shipped_recipes_are_listed_with_their_head_comment(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "# yaml-language-server: $schema=x\n# First line.\n#\n#   Indented.\n\n# No more.\nbad: [\n",
        "one.yaml",
    )
    write(tmp_path, "seed: 1\n", "two.yaml")
    assert shipped_recipes(tmp_path) == {"one": "First line.", "two": ""}
    assert head_comment(path) == "First line.\n\n  Indented."
