"""Which folder may know which: a file imports from lower rows and its own folder, and no files form a circle."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "opsin"

# From the bottom up. Folders of one row do not know each other.
ROWS = [
    ["__version__", "errors"],
    ["settings"],
    ["clock", "storage"],
    ["reporting", "nn"],
    ["processes"],
    ["data"],
    ["methods", "export"],
    ["training"],
    ["evaluation", "monitors"],
    ["run"],
    ["tuning"],
    ["commands"],
    ["__init__", "__main__"],
]

# The trainer and those who watch it know what a method is, never which one.
METHODS_SEEN_FROM = {"training": {"base"}, "evaluation": {"base"}, "monitors": {"base"}}

# Commands that list or restore start at once: what they import takes no time.
WITHOUT_TORCH = ("settings", "clock.cadence", "clock.schedule", "clock.timeline", "storage", "reporting")
WITHOUT_TORCH_FILES = ("processes.supervisor", "processes.trail", "processes.crashes", "processes.excluded")

ROW = {part: number for number, parts in enumerate(ROWS) for part in parts}
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}

each_file = pytest.mark.parametrize("name", FILES)


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write opsin.<folder>"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def own_processes(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of every process that a file starts from the package, as `python -m opsin.MODULE` does."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.List | ast.Tuple):
            continue
        words = [item.value if isinstance(item, ast.Constant) else None for item in node.elts]
        for flag, module in pairwise(words):
            if flag == "-m" and isinstance(module, str) and module.split(".")[0] == "opsin":
                yield node.lineno, "opsin.commands.main" if module == "opsin" else module


def file_of(target: str, files: Iterable[str]) -> str | None:
    """`data.order` for `opsin.data.order.Sampler`; None for what is no file of the package."""
    parts = target.split(".")[1:] if target.startswith("opsin.") else []
    known = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in known if name in files), None)


def links(name: str, *, processes: bool) -> list[tuple[int, str]]:
    """Line and name of the files that a file imports, and with `processes` of those that it starts."""
    source = FILES[name].read_text()
    needed = [*imports(source), *(own_processes(source) if processes else ())]
    found = [(line, file) for line, target in needed if (file := file_of(target, FILES))]
    return [(line, file) for line, file in found if file != name]


def fault(importer: str, target: str) -> str | None:
    """Why the file `importer` must not need the file `target`; None if it may."""
    mine, other = importer.split(".")[0], target.split(".")[0]
    if mine == other:
        return None
    if ROW[other] >= ROW[mine]:
        return f"`{other}` (row {ROW[other]}) is not below `{mine}` (row {ROW[mine]})"
    if other == "methods" and target.split(".")[1] not in METHODS_SEEN_FROM.get(mine, {target.split(".")[1]}):
        return f"`{mine}` may import methods.base only"
    return None


def circles(graph: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Every group of files that need each other, directly or through others."""
    reached = {name: reach(name, graph) for name in graph}
    found = (frozenset(other for other in reached[name] if name in reached[other]) for name in graph)
    return {group for group in found if group}


def reach(name: str, graph: Mapping[str, set[str]]) -> set[str]:
    """The files that a file needs, directly or through others."""
    seen: set[str] = set()
    left = [name]
    while left:
        new = graph[left.pop()] - seen
        seen |= new
        left += new
    return seen


GRAPH = {name: {target for _, target in links(name, processes=False)} for name in FILES}


@each_file
def test_imports_point_downwards(name: str) -> None:
    assert name.split(".")[0] in ROW, f"{name} has no row: add its folder to ROWS and to docs/ARCHITECTURE.md"
    faults = [
        f"{FILES[name]}:{line}: {why}" for line, target in links(name, processes=True) if (why := fault(name, target))
    ]
    assert not faults, "\n".join(faults)


def test_no_files_form_a_circle() -> None:
    assert not circles(GRAPH)


def test_every_folder_has_a_row_and_stands_in_the_documentation() -> None:
    assert {name.split(".")[0] for name in FILES} == {*ROW}
    page = (PACKAGE.parent.parent / "docs" / "ARCHITECTURE.md").read_text()
    table = page.partition("## Layers")[2].partition("##")[0]
    named = {name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([a-z_]+(?:\.py|/))`", table)}
    assert named == {*ROW} - {*ROWS[-1], "__version__"} | {"recipes"}


@pytest.mark.parametrize("name", [*WITHOUT_TORCH, *WITHOUT_TORCH_FILES])
def test_what_lists_and_restores_imports_no_torch(name: str) -> None:
    files = [file for file in FILES if file == name or file.startswith(f"{name}.")]
    needed = {file for start in files for file in {start, *reach(start, GRAPH)}}
    top = {target.split(".")[0] for file in needed for _, target in imports(FILES[file].read_text())}
    assert files
    assert not top & {"torch", "torchvision", "timm"}


def test_settings_start_at_once() -> None:
    allowed = sys.stdlib_module_names | {"pydantic", "pydantic_core", "ruamel", "opsin"}
    files = [path for name, path in FILES.items() if name.split(".")[0] in ("errors", "settings")]
    assert {target.split(".")[0] for path in files for _, target in imports(path.read_text())} <= allowed


def test_the_rules_find_what_they_are_for() -> None:
    assert fault("data.order", "methods.base")
    assert fault("data.order", "run.recipe")
    assert fault("nn.vit", "reporting.journal")
    assert fault("training.step", "methods.supervised")
    assert not fault("training.step", "methods.base")
    assert not fault("run.recipe", "methods.supervised")
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}
    started = list(own_processes("command = [sys.executable, '-m', 'opsin', 'train']"))
    assert [module for _, module in started] == ["opsin.commands.main"]
