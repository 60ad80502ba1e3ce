"""`tuned.yaml`: a recipe that extends another one with the keys that a measurement found."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from opsin.errors import RunError
from opsin.run.recipe import shipped
from opsin.settings.text import shipped_recipes
from opsin.settings.yaml_tree import read_overrides
from opsin.storage.files import write_atomic, writing

TUNED = "tuned.yaml"
WAY_OUT = "choose another folder with --out, or make room for it"


def as_overrides(found: Mapping[str, object]) -> list[str]:
    """Keys and values as `key=value`."""
    is_word = {key: isinstance(value, str) and re.fullmatch(r"[a-z]+\d+", value) for key, value in found.items()}
    return [f"{key}={value if is_word[key] else _yaml(value)}" for key, value in found.items()]


def tuned_recipe(reference: str, overrides: Sequence[str], found: Mapping[str, object], reason: str) -> str:
    """The text of a recipe that is `reference` with `overrides`, and over them the keys that were found."""
    base = reference if reference in shipped_recipes(shipped) else str(Path(reference).expanduser().resolve())
    tree, _ = read_overrides([*overrides, *as_overrides(found)])
    lines = [f"# {reason}", f"extends: {_yaml(base)}"]
    return "\n".join([*lines, *(f"{key}: {_yaml(value)}" for key, value in _leaves(tree.plain(), ""))]) + "\n"


def clear_results(folder: Path, names: frozenset[str]) -> None:
    """Make the folder, and remove the files of an earlier measurement, which could be taken for those of this one.

    Raises:
        RunError: it holds something else, or cannot be written.
    """
    with writing(folder, WAY_OUT):
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(item.name for item in folder.iterdir() if item.name not in names and item.name[0] != ".")
        if others:
            raise RunError(
                f"{folder}: holds other files ({others[0]}{', ...' if len(others) > 1 else ''}); "
                "choose an empty or a new folder with --out"
            )
        for name in names:
            (folder / name).unlink(missing_ok=True)


def write_results(folder: Path, name: str, facts: Mapping[str, object], text: str) -> None:
    """Write the facts as JSON, and the text of a tuned recipe unless it is empty.

    Raises:
        RunError: the folder cannot be written.
    """
    with writing(folder, WAY_OUT):
        if text:
            write_atomic(folder / TUNED, text.encode())
        write_atomic(folder / name, (json.dumps(facts, indent=2) + "\n").encode())


def _leaves(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, item in value.items():
        yield from _leaves(item, f"{prefix}.{key}" if prefix else key)


def _yaml(value: object) -> str:
    # JSON is YAML too.
    return json.dumps(value, ensure_ascii=False)
