"""Limits that keep the code readable: sizes, names, and where a few things may stand."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "opsin"

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FIT_LINES = 25

# Names that say nothing about what is inside. `base` is for protocol files.
EMPTY_NAMES = re.compile(r"(^|_)(utils?|common|helpers?|misc|core|stuff|tools?)$")

# Where code may ask for CUDA by name; everything else is handed a device.
CUDA_FILES = {
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


def is_torch_cuda(node: ast.Attribute) -> bool:
    return node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch"
