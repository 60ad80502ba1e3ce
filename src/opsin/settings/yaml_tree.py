"""YAML text as a tree in which every value knows the place where it was written.

YAML 1.2: `5e-4` is a number, `on` and `no` are text. A dotted key is short for nested keys: `data.path: x`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode

from opsin.errors import ConfigError

COMMAND_LINE = "command line"
Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, a list or a group of keys, and where it stands."""

    value: "Scalar | dict[str, Node] | list[Node]"
    place: str
    """`recipe.yaml:5` or `command line`."""
    group: type | None = None
    """The settings class that a group of keys is meant for, once that is known."""

    def plain(self) -> object:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def child(self, part: str | int) -> "Node | None":
        """The entry under a key or at an index, if there is one."""
        if isinstance(self.value, dict):
            return self.value.get(str(part))
        if isinstance(self.value, list) and isinstance(part, int) and part < len(self.value):
            return self.value[part]
        return None


def from_plain(value: object, place: str) -> Node:
    """A tree of Python dicts, lists and scalars, all of the same place."""
    if isinstance(value, dict):
        return Node({str(key): from_plain(item, place) for key, item in value.items()}, place)
    if isinstance(value, list):
        return Node([from_plain(item, place) for item in value], place)
    assert value is None or isinstance(value, str | int | float)
    return Node(value, place)


def read_file(path: Path, shown: str) -> Node:
    """The group of keys in a file; `shown` names the file in places.

    Raises:
        ConfigError: it cannot be read, is no YAML, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: is not UTF-8 text; save it as UTF-8") from error
    tree = _parse(text, lambda line: f"{shown}:{line}")
    if tree.value is None:
        return Node({}, shown)
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{tree.place}: a recipe must be keys and values, such as `seed: 1`")
    return Node(tree.value, shown)


def read_overrides(overrides: Sequence[str]) -> tuple[Node, list[str]]:
    """The group of keys that `a.b=value` arguments give, and the faults; of two values for one key the last counts."""
    place = COMMAND_LINE
    tree: dict[str, Node] = {}
    faults: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
            faults.append(f"{place}: {override!r} is no setting; write key=value, such as data.path=images")
        elif not text.strip():
            faults.append(f"{place}: {key}: has no value; write {key}=null for none or {key}='\"\"' for empty text")
        else:
            try:
                _insert(tree, key.split("."), Node(_parse(text, lambda _: place).value, place))
            except ConfigError:
                faults.append(f"{place}: {key}: {text!r} is no YAML value; quote it: {key}='\"...\"'")
    return Node(tree, place), faults


def _parse(text: str, place: Callable[[int], str]) -> Node:
    yaml = YAML(typ="safe", pure=True)
    faults: list[str] = []
    try:
        root = yaml.compose(text)
        tree = Node(None, place(1)) if root is None else _grow(root, yaml, place, faults)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise ConfigError(f"{place(line)}: is no valid YAML: {error.problem or error.context}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place(1)}: is no valid YAML: {str(error).splitlines()[0]}") from error
    if faults:
        raise ConfigError(*faults)
    return tree


def _grow(node: YamlNode, yaml: YAML, place: Callable[[int], str], faults: list[str]) -> Node:
    here = place(node.start_mark.line + 1)
    if isinstance(node, SequenceNode):
        return Node([_grow(item, yaml, place, faults) for item in node.value], here)
    if isinstance(node, MappingNode):
        group: dict[str, Node] = {}
        for key, item in node.value:
            if not isinstance(key, ScalarNode):
                faults.append(f"{here}: a key must be text, not a list or group")
                continue
            at = place(key.start_mark.line + 1)
            faults += _insert(group, key.value.split("."), Node(_grow(item, yaml, place, faults).value, at))
        return Node(group, here)
    value = yaml.constructor.construct_object(node)
    # Dates and the like have no place in a recipe: they stay the text that was written.
    return Node(value if value is None or isinstance(value, str | int | float) else str(node.value), here)


def _insert(group: dict[str, Node], path: Sequence[str], node: Node, prefix: str = "") -> list[str]:
    """Put `node` at a path, in place of what was there; the result has a fault for each value replaced."""
    head, *rest = path
    for key in reversed(rest):
        node = Node({key: node}, node.place)
    old = group.get(head)
    if old is None:
        group[head] = node
        return []
    if isinstance(old.value, dict) and isinstance(node.value, dict):
        return [
            fault for key, item in node.value.items() for fault in _insert(old.value, [key], item, f"{prefix}{head}.")
        ]
    group[head] = node
    return [f"{node.place}: {prefix}{head}: given twice; the first is at {old.place}"]
