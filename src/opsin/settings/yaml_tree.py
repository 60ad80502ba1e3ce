"""YAML text as a tree in which every value knows the location where it was written.

YAML 1.2: `5e-4` is a number, `on` and `no` are text. A dotted key is short for nested keys: `data.path: x`.
"""

import re
from collections.abc import Sequence
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
    """A scalar, a list or a group of keys, with the location where it was written."""

    value: "Scalar | dict[str, Node] | list[Node]"
    location: str
    """`recipe.yaml:5` or `command line`."""
    group: type | None = None
    """The settings class of a group of keys, once it is known."""

    def plain(self) -> object:
        """The value without locations."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def child(self, part: str | int) -> "Node | None":
        """The entry under a key or at an index, if it exists."""
        if isinstance(self.value, dict):
            return self.value.get(str(part))
        if isinstance(self.value, list) and isinstance(part, int) and part < len(self.value):
            return self.value[part]
        return None


def from_plain(value: object, location: str) -> Node:
    """A tree of Python dicts, lists and scalars, all at the same location."""
    if isinstance(value, dict):
        return Node({str(key): from_plain(item, location) for key, item in value.items()}, location)
    if isinstance(value, list):
        return Node([from_plain(item, location) for item in value], location)
    assert value is None or isinstance(value, str | int | float)
    return Node(value, location)


def read_file(path: Path, shown: str) -> Node:
    """The group of keys in a file; `shown` names the file in locations.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: is not UTF-8 text; save it as UTF-8") from error
    tree = _parse(text, shown)
    if tree.value is None:
        return Node({}, shown)
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{tree.location}: a recipe must be keys and values, such as `seed: 1`")
    return Node(tree.value, shown)


def read_overrides(overrides: Sequence[str]) -> tuple[Node, list[str]]:
    """The group of keys that `a.b=value` arguments give, and the faults; the last of two values for one key counts."""
    tree: dict[str, Node] = {}
    faults: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
            faults.append(f"{COMMAND_LINE}: {override!r} is not a setting; write key=value, such as data.path=images")
        elif not text.strip():
            faults.append(
                f"{COMMAND_LINE}: {key}: has no value; write {key}=null for none or {key}='\"\"' for empty text"
            )
        else:
            try:
                value = _parse(text, key).plain()
            except ConfigError:
                faults.append(f"{COMMAND_LINE}: {key}: {text!r} is not a YAML value; quote it: {key}='\"...\"'")
            else:
                _insert(tree, key.split("."), from_plain(value, COMMAND_LINE))
    return Node(tree, COMMAND_LINE), faults


def _parse(text: str, shown: str) -> Node:
    yaml = YAML(typ="safe", pure=True)
    faults: list[str] = []
    try:
        root = yaml.compose(text)
        tree = Node(None, f"{shown}:1") if root is None else _grow(root, yaml, shown, faults)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise ConfigError(f"{shown}:{line}: is not valid YAML: {error.problem or error.context}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{shown}:1: is not valid YAML: {str(error).splitlines()[0]}") from error
    if faults:
        raise ConfigError(*faults)
    return tree


def _grow(node: YamlNode, yaml: YAML, shown: str, faults: list[str]) -> Node:
    location = f"{shown}:{node.start_mark.line + 1}"
    if isinstance(node, SequenceNode):
        return Node([_grow(item, yaml, shown, faults) for item in node.value], location)
    if isinstance(node, MappingNode):
        group: dict[str, Node] = {}
        for key, item in node.value:
            if not isinstance(key, ScalarNode):
                faults.append(f"{location}: a key must be text, not a list or group")
                continue
            entry = Node(_grow(item, yaml, shown, faults).value, f"{shown}:{key.start_mark.line + 1}")
            faults += _insert(group, key.value.split("."), entry)
        return Node(group, location)
    value = yaml.constructor.construct_object(node)
    # Dates and the like do not exist in a recipe: they stay the text that was written.
    return Node(value if value is None or isinstance(value, str | int | float) else str(node.value), location)


def _insert(group: dict[str, Node], path: Sequence[str], node: Node, prefix: str = "") -> list[str]:
    """Put `node` at a path; the result has a fault for each value that it replaces."""
    head, *rest = path
    for key in reversed(rest):
        node = Node({key: node}, node.location)
    old = group.get(head)
    if old is not None and isinstance(old.value, dict) and isinstance(node.value, dict):
        return [
            fault for key, item in node.value.items() for fault in _insert(old.value, [key], item, f"{prefix}{head}.")
        ]
    group[head] = node
    return [] if old is None else [f"{node.location}: {prefix}{head}: given twice; the first is at {old.location}"]
