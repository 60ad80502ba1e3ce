"""Which part may know which: a file imports only from lower layers, never from a sibling folder."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "opsin"

# From the bottom up. Folders of one layer do not know each other; a file may know the files named before it.
LAYERS = [
    ["errors", "yaml_tree", "settings", "config_faults", "recipe_text", "config", "folders", "runlock", "rundir"],
    [
        "timeline",
        "cadence",
        "schedule",
        "seeding",
        "distributed",
        "quantiles",
        "compression",
        "backup",
        "trail",
        "put_aside",
        "crashes",
        "outlets",
        "jsonl",
        "reporting",
        "webhook",
        "painter",
        "sinks",
        "curves",
        "pictures",
        "plots",
        "console",
    ],
    ["nn", "data"],
    ["methods"],
    ["training"],
    ["evaluation", "monitors"],
    [
        "recipe",
        "export",
        "stages",
        "assembly_numerics",
        "assembly_images",
        "assembly_guard",
        "assembly",
        "results",
        "lr_search",
        "session",
    ],
    [
        "verify",
        "tuning",
        "datasets",
        "supervise",
        "cli_supervision",
        "cli_backup",
        "checkpoints_command",
        "cli_checkpoints",
    ],
    ["cli"],
    ["__init__", "__main__"],
]

# The trainer and those who watch it know what a method is, never which one.
METHODS_SEEN_FROM = {"training": {"base"}, "evaluation": {"base"}, "monitors": {"base"}}

# The lowest layer starts at once: it imports nothing that takes time.
FAST_IMPORTS = {"pydantic", "pydantic_core", "ruamel"}

LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """`data` for data/order.py, `cli` for commands/main.py: the entry of LAYERS that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, list[str]]]:
    """Line and dotted path of every import, also inside functions and under TYPE_CHECKING."""
    found: list[tuple[int, list[str]]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}:{node.lineno}: relative import; write opsin.<part>"
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write opsin.<part>"
            found += [(node.lineno, [*node.module.split("."), alias.name]) for alias in node.names]
    return found


def is_folder(part: str) -> bool:
    return (PACKAGE / part).is_dir()


def fault(importer: str, target: list[str]) -> str | None:
    """Why a file of `importer` must not import `opsin.<target>`; None if it may."""
    part = target[0]
    if part not in LEVEL:
        # A name of the package itself (`__version__`): the package is imported before all its parts.
        return None if importer in LAYERS[-1] or part.startswith("__") else f"`{part}` stands in no layer"
    if part == importer:
        return None
    if LEVEL[part] == LEVEL[importer] and not (is_folder(part) or is_folder(importer)):
        neighbours = LAYERS[LEVEL[part]]
        if neighbours.index(part) < neighbours.index(importer):
            return None
    if LEVEL[part] >= LEVEL[importer]:
        return f"`{part}` (layer {LEVEL[part]}) is not below `{importer}` (layer {LEVEL[importer]})"
    allowed = METHODS_SEEN_FROM.get(importer)
    if part == "methods" and allowed is not None and not allowed & set(target[1:2]):
        return f"`{importer}` may import methods.base only"
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    importer = part_of(path)
    assert importer in LEVEL, f"{importer} has no layer: add it to LAYERS and to docs/ARCHITECTURE.md"
    faults = []
    for line, target in imports(path):
        if target[0] == "opsin" and (why := fault(importer, target[1:] or ["__init__"])):
            faults.append(f"{path.relative_to(PACKAGE)}:{line}: {why}")
    assert not faults, "\n".join(faults)


def test_every_part_that_has_a_layer_is_there_and_stands_in_the_documentation() -> None:
    parts = {part_of(path) for path in FILES}
    assert {*LEVEL} == parts
    page = (PACKAGE.parent.parent / "docs" / "ARCHITECTURE.md").read_text()
    table = page.partition("## Layers")[2].partition("##")[0]
    told = {name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([a-z_]+(?:\.py|/))`", table)}
    assert told == parts - {*LAYERS[-1]} | {"recipes"}


@pytest.mark.parametrize("part", LAYERS[0])
def test_the_lowest_layer_imports_nothing_slow(part: str) -> None:
    allowed = sys.stdlib_module_names | FAST_IMPORTS | {"opsin"}
    assert {target[0] for _, target in imports(PACKAGE / f"{part}.py")} <= allowed


def test_the_rule_finds_an_upward_import() -> None:
    assert fault("data", ["methods", "base"])
    assert fault("data", ["nn", "backbone"])
    assert fault("settings", ["config"])
    assert fault("training", ["methods", "supervised"])
    assert not fault("training", ["methods", "base"])
    assert not fault("config", ["settings"])
    assert not fault("recipe", ["methods", "supervised"])
