"""Faults that pydantic finds in a recipe, in plain words: location, key, value, rule, way out."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from opsin.settings.family import Family, Settings, keys
from opsin.settings.yaml_tree import Node

_SECRET = re.compile(r"(?<=://)\S+(?=@)")  # the user and the password of an address

_RULES: Mapping[str, str] = {
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    **dict.fromkeys(("string_type", "path_type"), "text"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type"), "a group of keys"),
    "group_type": "a group of keys, such as {key}.name={example}",
    "none_required": "null",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text like {pattern}",
}

# The fault of a value by the type of the error; for all other types, the message states the kind of the value.
_FACTS: Mapping[str, str] = {
    "finite_number": "is not finite",
    **dict.fromkeys(("greater_than", "greater_than_equal", "less_than", "less_than_equal"), "is out of range"),
    **dict.fromkeys(("multiple_of", "string_pattern_mismatch"), "does not fit"),
    **dict.fromkeys(("too_short", "string_too_short"), "is too short"),
    **dict.fromkeys(("too_long", "string_too_long"), "is too long"),
}


def faults_of(error: ValidationError, tree: Node, model: type[Settings]) -> list[str]:
    """One line for each wrong key of the merged `tree`."""
    # A union gives an error for each alternative: together they are one fault.
    by_key: dict[tuple[str, bool], list[tuple[list[Node], ErrorDetails]]] = {}
    for detail in error.errors(include_url=False):
        path, nodes = _locate(detail, tree)
        by_key.setdefault((".".join(path), detail["type"] == "missing"), []).append((nodes, detail))
    return [_line(dotted, found, model) for (dotted, _), found in by_key.items()]


def _locate(detail: ErrorDetails, tree: Node) -> tuple[list[str], list[Node]]:
    """The keys that lead to the fault, and the nodes along them, the root first."""
    path: list[str] = []
    nodes = [tree]
    for index, part in enumerate(detail["loc"]):
        child = nodes[-1].child(part)
        if child is not None:
            path.append(str(part))
            nodes.append(child)
        elif index == len(detail["loc"]) - 1 and detail["type"] in ("missing", "unknown_member"):
            path.append(str(part))
        # All other parts are pydantic's names for the alternatives of a union.
    return path, nodes


def _line(dotted: str, found: Sequence[tuple[list[Node], ErrorDetails]], model: type[Settings]) -> str:
    nodes, detail = found[0]
    if detail["type"] == "extra_forbidden":
        message = _unknown_key(dotted, nodes[-2].group, nodes[-2], model)
    elif detail["type"] == "unknown_member":
        message = _unknown_member(detail)
    elif detail["type"] == "missing":
        entries = nodes[-1].value
        short = isinstance(entries, list) and f"the list ends after {len(entries)}"
        message = f"missing; {short or f'give it in the recipe or as {dotted}=VALUE'}"
    elif isinstance((detail.get("ctx") or {}).get("error"), Exception):
        message = str(detail["ctx"]["error"])
    elif detail["type"] in _RULES:
        message = _broken_rule(dotted, nodes[-1], [detail for _, detail in found])
    else:
        message = f"{_shown(nodes[-1].plain())} does not fit: {detail['msg']}"
    return ": ".join(filter(None, [nodes[-1].location, dotted, message]))


def _unknown_key(dotted: str, group: type | None, parent: Node, model: type[Settings]) -> str:
    leaf = dotted.rpartition(".")[2]
    if group is not None and issubclass(group, Family):
        root = group.root()
        owners = [name for name, member in root.members().items() if leaf in member.model_fields]
        if owners:
            name = parent.child("name")
            chosen = "" if name is None else f", not {name.plain()!r}"
            return f"is a key of {root.noun()} {_either([repr(owner) for owner in owners], 'and')}{chosen}"
    prefix = dotted[: len(dotted) - len(leaf)]
    siblings = list(group.model_fields) if group is not None and issubclass(group, Settings) else []
    everywhere = keys(model)
    guess = (
        [prefix + key for key in difflib.get_close_matches(leaf, siblings, 1)]
        or [key for key in everywhere if key.rpartition(".")[2] == leaf]
        or difflib.get_close_matches(dotted, everywhere, 1, cutoff=0.8)
    )
    if guess:
        return f"unknown key; did you mean {guess[0]}?"
    return f"unknown key; known here: {', '.join(siblings)}" if siblings else "unknown key"


def _unknown_member(detail: ErrorDetails) -> str:
    noun, known = detail["ctx"]["noun"], detail["ctx"]["known"]
    if detail["input"] is None:
        return f"missing; known: {', '.join(known)}"
    return f"unknown {noun} {_shown(detail['input'])}; known: {', '.join(known)}{did_you_mean(detail['input'], known)}"


def _broken_rule(dotted: str, node: Node, details: Sequence[ErrorDetails]) -> str:
    value = node.plain()
    contexts = [{key: _number(item) for key, item in (detail.get("ctx") or {}).items()} for detail in details]
    rules = [
        _RULES[d["type"]].format(key=dotted, **ctx)
        for d, ctx in zip(details, contexts, strict=True)
        if d["type"] in _RULES
    ]
    options = [option for ctx in contexts for option in re.findall(r"'([^']*)'", str(ctx.get("expected", "")))]
    known = [_FACTS[detail["type"]] for detail in details if detail["type"] in _FACTS]
    if known:
        fact = known[0]
    elif value is None:
        fact = "is not allowed"
    else:
        fact = "is not an option" if isinstance(value, str) and options else f"is {_kind(value)}"
    return f"{_shown(value)} {fact}; must be {_either(list(dict.fromkeys(rules)), 'or')}{did_you_mean(value, options)}"


def did_you_mean(value: object, options: Sequence[str]) -> str:
    """`; did you mean X?` if an option is close, else nothing."""
    close = difflib.get_close_matches(value, options, 1) if isinstance(value, str) else []
    return f"; did you mean {close[0]}?" if close else ""


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number" if isinstance(value, int) or value.is_integer() else "a fraction"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "a group of keys"


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _SECRET.sub("***", text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _either(parts: Sequence[str], word: str) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
