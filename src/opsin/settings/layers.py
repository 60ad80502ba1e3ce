"""Reads a recipe: base recipes, the recipe itself and `key=value` overrides, laid over each other.

Each layer changes only the keys that it gives. A list is replaced as a whole, one entry of it by its index
(`stages.1.epochs=5`); `null` takes an entry out of a table such as `evaluators`. Choosing another member of a family
(`method.name=ijepa`) drops every key that lower layers gave to the old one. Relative paths of a recipe's values are
relative to the working directory; only `extends` is relative to the file.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from opsin.errors import ConfigError
from opsin.settings.family import Family, Settings, Shape, shape_of
from opsin.settings.faults import did_you_mean, faults_of
from opsin.settings.yaml_tree import COMMAND_LINE, Node, from_plain, read_file, read_overrides

S = TypeVar("S", bound=Settings)


def read(reference: str, overrides: Sequence[str], model: type[S], *, shipped: Path, chosen: Sequence[str] = ()) -> S:
    """The settings that a recipe and the overrides give together.

    `reference` is the name of a recipe in the folder `shipped`, or the path of a YAML file. `chosen` are overrides for
    keys that say `auto`: they lie directly over the highest layer with one, and under all that was written above it.

    Raises:
        ConfigError: with one line for each fault, all at once.
    """
    top, faults = read_overrides(overrides)
    try:
        layers = [*_recipe_layers(reference, shipped), top]
        recipe = layers[-2]
    except ConfigError as error:
        raise ConfigError(*error.faults, *faults) from error
    if chosen:
        above = 1 + max(number for number, layer in enumerate(layers) if _says_auto(layer, chosen))
        layers.insert(above, read_overrides(chosen)[0])
    tree: Node | None = None
    for layer in layers:
        tree = _lay(shape_of(model), tree, layer, None)
    assert tree is not None
    tree = _with_required_groups(replace(tree, location=recipe.location))
    try:
        settings = model.model_validate_json(json.dumps(tree.plain()))
    except ValidationError as error:
        raise ConfigError(*faults, *faults_of(error, tree, model)) from error
    if faults:
        raise ConfigError(*faults)
    return settings


def _says_auto(layer: Node, keys: Sequence[str]) -> bool:
    """True if the layer gives `auto` for one of the overrides `keys`."""
    for key in keys:
        node: Node | None = layer
        for part in key.partition("=")[0].split("."):
            node = None if node is None else node.child(part)
        if node is not None and node.value == "auto":
            return True
    return False


def _recipe_layers(reference: str, shipped: Path) -> list[Node]:
    """The recipe and all that it extends, the lowest first."""
    layers: list[Node] = []
    seen: list[Path] = []
    location, folder = COMMAND_LINE, Path()
    while True:
        path = _find(reference, folder, shipped, location)
        if path.resolve() in (known.resolve() for known in seen):
            circle = " -> ".join(known.name for known in [*seen, path])
            raise ConfigError(f"{location}: circular: {circle}; remove one")
        seen.append(path)
        layer = read_file(path, path.name if path.parent == shipped else str(path))
        assert isinstance(layer.value, dict)
        layers.insert(0, layer)
        base = layer.value.pop("extends", None)
        if base is None:
            return layers
        location = f"{base.location}: extends"
        if not isinstance(base.value, str):
            raise ConfigError(f"{location}: {base.plain()!r} must be the name of a shipped recipe or a path")
        reference, folder = base.value, path.parent


def _find(reference: str, folder: Path, shipped: Path, location: str) -> Path:
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    if reference in names:
        return shipped / f"{reference}.yaml"
    path = folder / os.path.expanduser(reference)
    if path.is_file():
        return path
    raise ConfigError(
        f"{location}: {reference}: is neither a file nor a shipped recipe; shipped: {', '.join(names) or 'none'}"
        f"{did_you_mean(reference, names)}"
    )


def _lay(shape: Shape, low: Node | None, high: Node, default: Node | None) -> Node:
    """`high` over `low`, or over the key's default where no lower layer gives the key."""
    if low is None or low.value is None:
        low = default
    if isinstance(high.value, list) and shape.kind == "list":
        return replace(high, value=[_lay(shape_of(shape.item), None, item, None) for item in high.value])
    if not isinstance(high.value, dict) or shape.kind == "leaf":
        return high
    if shape.kind == "list":
        return _lay_entries(shape, low, high, high.value)
    if shape.kind == "table":
        return _lay_table(shape, low, high, high.value)
    group = _choose(shape.item, high, low, default)
    return high if group is None else _lay_group(group, low, high, high.value, default)


def _lay_group(
    group: type[Settings], low: Node | None, high: Node, entries: Mapping[str, Node], default: Node | None
) -> Node:
    if low is not None and low.group is None and low is not default and isinstance(low.value, dict):
        # A lower layer left the choice open; now it is made.
        low = _lay_group(group, default, low, low.value, default)
    if low is None or low.group is not group:
        low = default if default is not None and default.group is group else None
    below = low.value if low is not None and isinstance(low.value, dict) else {}
    defaults = _defaults(group)
    merged = dict(below)
    for key, node in entries.items():
        field = group.model_fields.get(key)
        inner = Shape("leaf", None) if field is None else shape_of(field.annotation)
        merged[key] = _lay(inner, below.get(key), node, defaults.get(key))
    # A missing key belongs in a file, not on the command line.
    in_file = low is not None and low is not default and high.location == COMMAND_LINE
    return Node(merged, low.location if low is not None and in_file else high.location, group)


def _lay_entries(shape: Shape, low: Node | None, high: Node, entries: Mapping[str, Node]) -> Node:
    """Single entries of a list, by index."""
    below = low.value if low is not None else None
    if not isinstance(below, list) or any(not key.isdecimal() or int(key) >= len(below) for key in entries):
        return high
    merged = list(below)
    for key, node in entries.items():
        merged[int(key)] = _lay(shape_of(shape.item), below[int(key)], node, None)
    return replace(high, value=merged)


def _lay_table(shape: Shape, low: Node | None, high: Node, entries: Mapping[str, Node]) -> Node:
    item = shape_of(shape.item)
    merged = dict(low.value) if low is not None and isinstance(low.value, dict) else {}
    for key, node in entries.items():
        if node.value is None and not item.is_optional:
            merged.pop(key, None)
        else:
            merged[key] = _lay(item, merged.get(key), node, _namesake(item, key))
    return replace(high, value=merged)


def _namesake(item: Shape, key: str) -> Node | None:
    """The family member that an entry's key names: `evaluators: {knn: {}}` needs no `name: knn`."""
    member = item.item.members().get(key) if item.kind == "settings" and issubclass(item.item, Family) else None
    return None if member is None else Node({"name": Node(key, "default")}, "default", member)


def _choose(settings: type[Settings], *nodes: Node | None) -> type[Settings] | None:
    """The settings class of a group: for a family, the member of the first name given; None if that is unknown."""
    if not issubclass(settings, Family) or settings.root() is not settings:
        return settings
    names = (node.child("name") for node in nodes if node is not None)
    return next((settings.member(name.value) for name in names if name is not None), None)


def _defaults(group: type[Settings]) -> dict[str, Node]:
    """Defaults that a layer can change in part: groups, lists and tables."""
    found: dict[str, Node] = {}
    for key, field in group.model_fields.items():
        shape = shape_of(field.annotation)
        if shape.kind != "leaf" and not field.is_required():
            value = to_jsonable_python(field.get_default(call_default_factory=True, validated_data={}))
            found[key] = _lay(shape, None, from_plain(value, "default"), None)
    return found


def _with_required_groups(node: Node) -> Node:
    """The tree with an empty group for each required one, so that faults name its missing keys."""
    if not isinstance(node.value, dict) or node.group is None:
        return node
    assert issubclass(node.group, Settings)
    filled = {key: _with_required_groups(item) for key, item in node.value.items()}
    for key, field in node.group.model_fields.items():
        shape = shape_of(field.annotation)
        if field.is_required() and shape.kind == "settings" and not shape.is_optional and key not in filled:
            filled[key] = _with_required_groups(_lay(shape, None, Node({}, node.location), None))
    return replace(node, value=filled)
