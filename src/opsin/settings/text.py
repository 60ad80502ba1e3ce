"""Recipes as text: the whole effective recipe with comments, differences, the JSON schema, the shipped recipes."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from opsin.settings.family import Family, Settings

_COMMENT_COLUMN = 40
# YAML 1.2 knows the first three; the others are for readers of YAML 1.1.
_NOT_TEXT = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def to_yaml(settings: Settings, *, comments: bool, head: str = "") -> str:
    """The whole recipe as YAML; `read` turns it into equal settings.

    With `comments`, each key is followed by the first sentence of its documentation; `head` becomes a comment on top.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    for text, comment in _group_lines(settings, ""):
        lines.append(f"{text:<{_COMMENT_COLUMN}}  # {comment}" if comments and comment else text)
    return "\n".join(lines) + "\n"


def diff(before: Settings, after: Settings) -> list[str]:
    """One line `optim.lr: 0.1 -> 0.2` for each key that differs; `(none)` stands for a missing key."""
    old, new = flatten(before), flatten(after)
    shown = [
        (key, _flow(old[key]) if key in old else "(none)", _flow(new[key]) if key in new else "(none)")
        for key in dict.fromkeys([*old, *new])
    ]
    return [f"{key}: {was} -> {now}" for key, was, now in shown if was != now]


def flatten(settings: Settings) -> dict[str, object]:
    """Every dotted key with its value as JSON knows it; a list of scalars is one value."""
    return dict(_leaves(settings.model_dump(mode="json"), ""))


def json_schema(model: type[Settings]) -> dict[str, object]:
    """The JSON schema of a recipe file, for editors."""
    schema: dict[str, Any] = _without_required(model.model_json_schema())
    schema["properties"] = {
        "extends": {"type": "string", "description": "A shipped recipe, or the path of one, to start from."},
        **schema.get("properties", {}),
    }
    schema["patternProperties"] = {r"^\w+\.": {}}
    for table in schema["properties"].values():
        if isinstance(entry := table.get("additionalProperties"), dict):
            table["additionalProperties"] = {"anyOf": [entry, {"type": "null"}]}  # null takes an entry out
    return schema


def head_comment(path: Path) -> str:
    """The text of the comment lines at the top of a recipe."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server:"):
            lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return "\n".join(lines).strip()


def shipped_recipes(folder: Path) -> dict[str, str]:
    """The names of the recipes in a folder, each with the first line of its head comment."""
    return {path.stem: head_comment(path).partition("\n")[0] for path in sorted(folder.glob("*.yaml"))}


def _without_required(schema: Any) -> Any:
    """The schema without lists of required keys: each key may come from the extended recipe or the command line."""
    if isinstance(schema, list):
        return [_without_required(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    required = isinstance(schema.get("required"), list)
    return {key: _without_required(item) for key, item in schema.items() if key != "required" or not required}


def _group_lines(settings: Settings, indent: str) -> Iterator[tuple[str, str]]:
    """The lines of a group of keys, each with its comment."""
    for key, field in type(settings).model_fields.items():
        value = getattr(settings, key)
        words = " ".join((field.description or "").split())
        comment = re.split(r"(?<=[.!?])\s", words, maxsplit=1)[0]
        if key == "name" and isinstance(settings, Family) and not comment:
            comment = (
                f"One of {', '.join(settings.root().members())}{' or others' if settings.root().fallback() else ''}."
            )
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            # `read` starts from the default: null removes an entry of it.
            value = {**value, **{name: None for name in default if name not in value}}
        yield from _value_lines(f"{indent}{_text(key)}:", value, indent, comment)


def _value_lines(start: str, value: object, indent: str, comment: str) -> Iterator[tuple[str, str]]:
    """The lines of a value behind `start`, which is a key with its colon."""
    if isinstance(value, Settings) and type(value).model_fields:
        yield start, comment
        yield from _group_lines(value, indent + "  ")
    elif isinstance(value, Mapping) and value:
        yield start, comment
        for key, item in value.items():
            yield from _value_lines(f"{indent}  {_text(str(key))}:", item, indent + "  ", "")
    elif isinstance(value, list | tuple) and any(isinstance(item, Settings | Mapping) for item in value):
        yield start, comment
        for item in value:
            lines = list(_value_lines("", item, indent + "  ", ""))
            block = lines[1:] if len(lines) > 1 else lines
            first, first_comment = block[0]
            yield f"{indent}  - {first.lstrip()}", first_comment
            yield from block[1:]
    else:
        yield f"{start} {_flow(to_jsonable_python(value))}", comment


def _leaves(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield prefix, value
        return
    for key, item in items:
        yield from _leaves(item, f"{prefix}.{key}" if prefix else key)


def _flow(value: object) -> str:
    """A value on one line."""
    if isinstance(value, list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_text(str(key))}: {_flow(item)}' for key, item in value.items())}}}"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    """Text plain where YAML reads it back as that text, else in double quotes."""
    if re.fullmatch(r"([A-Za-z_]|\.{0,2}/)[\w./+-]*", value, re.ASCII) and value.lower() not in _NOT_TEXT:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in quoted)
