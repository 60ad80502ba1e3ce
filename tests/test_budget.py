"""Limits that keep the code readable: sizes, names, and where a few things may stand."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from opsin.run.recipe import Recipe
from opsin.settings.text import json_schema
from tests.test_layers import FILES, GRAPH, reach

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "opsin"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FIT_LINES = 25

MAX_PARAMETERS = 8
MAX_TOP_NAMES = 17
MAX_LOOP_LINES = 6_250
MAX_METHOD_FILES = 20
MAX_LINES = 30_600
MAX_PART_LINES = {"storage/backup": 1_700, "data/curation": 1_700, "tuning": 1_700, "export": 1_700, "monitors": 1_700}

# Folders whose functions may take functions: a layer, a loss or a score is one.
OF_FUNCTIONS = {"methods", "nn", "evaluation"}

# Functions outside of them that take a function, and why an object would be worse.
TAKES_FUNCTIONS = {
    "training/optim.py _times": "a factor on a learning rate is a number or a function of the clock",
    "run/sweep.py _rising": "the rates of a sweep are the schedule of a step plan, which is a function of the clock",
    "data/views/colour.py change_chosen": "mathematics: an operation on the chosen images of a batch",
    "data/views/randaugment.py _change_in_place": "mathematics: an operation on the chosen images of a batch",
    **dict.fromkeys(
        ("reporting/lines.py __init__", "reporting/lines.py read_lines", "reporting/lines.py parse_line"),
        "a predicate on a line: rows and events differ in what a whole line has",
    ),
}

# First words of a docstring that delay its subject.
SLOW_HEADS = {"what", "how", "whether", "where", "which", "why", "who", "when", "that"}

# Words with a better one of the field: location, excluded, again, reported, this many, fault.
FORBIDDEN = re.compile(r"\b(places?|aside|anew|told|so many|trouble|that what)\b", re.IGNORECASE)

# Lines with such a word that stay: keys of files that older and newer versions read.
KEPT_WORDS = (
    '"class", "place"), rows)',
    'Field(alias="place")',
    '"places": crash.locations',
)

# Names that say nothing about what is inside. `base` is for protocol files.
EMPTY_NAMES = re.compile(r"(^|_)(utils?|common|helpers?|misc|core|stuff|tools?)$")

# Where code may ask for CUDA by name; everything else is handed a device.
CUDA_FILES = {
    "errors.py",
    "clock/seeding.py",
    "processes/world.py",
    "data/resident.py",
    "monitors/throughput.py",
    "training/memory.py",
    "training/precision.py",
    "training/stopwatch.py",
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = sorted(path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
each_file = pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


@each_file
def test_a_file_is_one_topic_of_readable_length(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines; split it by topic"
    assert not EMPTY_NAMES.search(path.stem), f"{path.stem}: name the file after what is in it"


@each_file
def test_a_function_fits_a_screen(path: Path) -> None:
    long = {f"{path.name}:{f.lineno} {f.name}": num_lines(f) for f in functions(path)}
    assert not {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}


def test_the_loop_fits_half_a_screen() -> None:
    (fit,) = (f for f in functions(PACKAGE / "training" / "loop.py") if f.name == "fit")
    docstring = fit.body[0] if ast.get_docstring(fit) else None
    about = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
    assert num_lines(fit) - about <= MAX_FIT_LINES


@each_source
def test_cuda_is_named_in_few_places(path: Path) -> None:
    if str(path.relative_to(PACKAGE)) in CUDA_FILES:
        return
    named = [node.lineno for node in nodes(path) if isinstance(node, ast.Attribute) and is_torch_cuda(node)]
    assert not named, f"torch.cuda at lines {named}; ask training/precision.py or take a device"


@pytest.mark.parametrize("path", sorted((PACKAGE / "training").rglob("*.py")), ids=lambda path: path.name)
def test_the_trainer_does_not_ask_which_method_it_trains(path: Path) -> None:
    asked = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for node in nodes(path)
        if isinstance(node, ast.Compare)
        and "method" in ast.unparse(node)
        and any(
            isinstance(side, ast.Constant) and isinstance(side.value, str) for side in [node.left, *node.comparators]
        )
    ]
    assert not asked, "give Method a place for it instead"


def test_an_update_never_waits_for_the_device() -> None:
    waiting = {"item", "cpu", "tolist", "numpy", "synchronize"}
    found = [
        f"step.py:{node.lineno}: .{node.func.attr}()"
        for node in nodes(PACKAGE / "training" / "step.py")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waiting
    ]
    assert not found


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument for argument in given if argument.arg not in ("self", "cls")]


def names_of_callables() -> set[str]:
    """`Callable`, and every name that stands for one in the package."""
    names = {"Callable"}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if re.match(r"(collections\.abc\.)?Callable\[", ast.unparse(node.value)):
                    names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def documents(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, and of every text under an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), text
            for before, after in pairwise(node.body):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if is_text and isinstance(before, ast.Assign | ast.AnnAssign):
                    yield after.lineno, str(after.value.value)  # type: ignore[attr-defined]


CALLABLES = names_of_callables()


@each_source
def test_a_function_takes_few_parameters(path: Path) -> None:
    long = {f"{path.name}:{f.lineno} {f.name}": len(parameters(f)) for f in functions(path)}
    assert not {name: count for name, count in long.items() if count > MAX_PARAMETERS}, "give an object that has a name"


@each_source
def test_functions_are_handed_through_nowhere_but_in_mathematics(path: Path) -> None:
    inside = path.relative_to(PACKAGE)
    if inside.parts[0] in OF_FUNCTIONS:
        return
    found = [
        f"{inside} {function.name}"
        for function in functions(path)
        for argument in parameters(function)
        if argument.annotation is not None
        and {node.id for node in ast.walk(argument.annotation) if isinstance(node, ast.Name)} & CALLABLES
    ]
    assert not [name for name in found if name not in TAKES_FUNCTIONS], "give an object that has a name"


@each_source
def test_a_docstring_begins_with_its_subject(path: Path) -> None:
    texts = list(documents(ast.parse(path.read_text())))
    heads = [(line, match[0].lower(), text) for line, text in texts if (match := re.search(r"\w+", text))]
    assert not [f"{path.name}:{line}: {text[:60]}" for line, head, text in heads if head in SLOW_HEADS]


@each_source
def test_words_are_those_of_the_field(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    found = [f"{path.name}:{number}: {line.strip()}" for number, line in lines if FORBIDDEN.search(line)]
    assert not [
        line for line in found if not line.endswith(KEPT_WORDS) and not any(kept in line for kept in KEPT_WORDS)
    ]


def test_each_key_of_a_recipe_has_a_sentence_of_its_own() -> None:
    found = []
    for name in Recipe.model_fields:
        assert Recipe.model_fields[name].description
    groups: Any = json_schema(Recipe)["$defs"]
    for group, facts in groups.items():
        for key, about in facts.get("properties", {}).items():
            text = about.get("description", "")
            if key != "name" and (not text.endswith((".", '"')) or "..." in text):
                found.append(f"{group}.{key}: {text!r}")
    assert not found


def test_the_package_shows_few_names_at_its_top() -> None:
    tops = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")} | {"recipes"}
    assert len(tops - {"__init__.py", "__main__.py", "__version__.py"}) <= MAX_TOP_NAMES


def num_file_lines(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_the_package_stays_small() -> None:
    assert num_file_lines(*SOURCES) <= MAX_LINES
    sizes = {part: num_file_lines(*(PACKAGE / part).rglob("*.py")) for part in MAX_PART_LINES}
    assert not {part: lines for part, lines in sizes.items() if lines > MAX_PART_LINES[part]}


def test_the_loop_and_a_method_need_little() -> None:
    needed = reach("training.loop", GRAPH)
    assert num_file_lines(*(FILES[name] for name in needed)) <= MAX_LOOP_LINES
    methods = {name: len(reach(name, GRAPH)) for name in FILES if name.startswith("methods.")}
    assert not {name: files for name, files in methods.items() if files > MAX_METHOD_FILES}


def is_torch_cuda(node: ast.Attribute) -> bool:
    return node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch"
