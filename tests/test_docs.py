"""What is written for readers agrees with what is there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import RunOpsin

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "opsin"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECIPES = sorted((PACKAGE / "recipes").glob("*.yaml"))

# Written in the head comment of a shipped recipe in this order, each followed by its value.
RECIPE_FACTS = ("Command:", "Expected:", "Time:", "Hardware:")

# Files that set things up; an address in one of them ties the project to one network.
SETUP_FILES = ("constraints*.txt", "requirements*.txt", "Makefile", ".ci/*", "*.lock", "*.cfg", "pyproject.toml")

# Folders of one person or one machine.
PRIVATE_PATH = re.compile(r"/(home|root|Users)/[\w.-]+")


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def head_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    length = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.lstrip("# ") for line in lines[:length])


def code_in(text: str) -> str:
    """Everything between backticks or in fenced blocks."""
    return "\n".join(a or b for a, b in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_path_of_the_architecture_page_exists() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    paths = set(re.findall(r"`([\w./<>-]+(?:/|\.(?:py|md|yaml|toml|txt|sh)))`", text))
    assert len(paths) > 20, "the page names the files of the package"
    patterns = {path: re.sub(r"<\w+>", "*", path).rstrip("/") for path in paths}
    assert [path for path, glob in patterns.items() if not any([*ROOT.glob(glob), *PACKAGE.glob(glob)])] == []


def test_every_part_of_the_package_is_on_the_architecture_page() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    parts = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")} - {
        "__init__.py",
        "__main__.py",
        "__version__.py",
    }
    assert [part for part in sorted(parts) if not re.search(rf"\b{part.removesuffix('.py')}\b", text)] == []


def test_every_command_is_documented(run_opsin: RunOpsin) -> None:
    # The commands as a user sees them: the indented words at the start of a line of the help.
    commands = re.findall(r"^ {4}(\w+)", run_opsin("--help").stdout, flags=re.MULTILINE)
    assert {"train", "resume", "eval"} <= set(commands)
    written = code_in("\n".join(page.read_text() for page in PAGES))
    assert [name for name in commands if not re.search(rf"\bopsin {name}\b", written)] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_for_and_what_to_expect(recipe: Path) -> None:
    lines = head_comment(recipe).splitlines()
    assert lines[0].endswith(".")
    facts = [words[0] for line in lines if len(words := line.split()) > 1 and words[0] in RECIPE_FACTS]
    assert facts == [*RECIPE_FACTS]
    assert any(re.match(rf"Command: *opsin train {re.escape(recipe.stem)}\b", line) for line in lines)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_named_in_the_documents(recipe: Path) -> None:
    assert recipe.stem in (ROOT / "README.md").read_text() + (ROOT / "docs" / "RECIPES.md").read_text()


def test_the_method_of_the_documents_trains(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "METHODS.md").read_text(), flags=re.DOTALL)
    (tmp_path / "rotation.py").write_text(example)
    command = [sys.executable, "rotation.py"]
    done = subprocess.run(command, cwd=tmp_path, env=opsin_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = (tmp_path / "runs" / "rotation" / "metrics.jsonl").read_text().splitlines()[-1]
    assert "train/turns_found" in last
    assert "knn/top1" in last


def test_the_extensions_of_the_documents_are_found_by_their_entry_points(
    tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "EXTENDING.md").read_text(), flags=re.DOTALL)
    package, metadata = tmp_path / "site" / "extensions_of_the_documents", tmp_path / "site" / "extensions-1.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    names = [re.match(r'"""(\w+)\.py', block)[1] for block in blocks]  # type: ignore[index]
    for name, block in zip(names, blocks, strict=True):
        (package / f"{name}.py").write_text(block)
    points = "\n".join(f"{name} = extensions_of_the_documents.{name}" for name in names)
    (metadata / "entry_points.txt").write_text(f"[opsin]\n{points}\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: extensions\nVersion: 1\n")
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(64) % 10)
    keys = ("data.path=images.npz", "monitors.weights.name=weight_size", "monitors.weights.limit=0.001")
    few = ("evaluators.spread.name=spread", "limits.steps=2", "batch_size=16", "log.every=1", "model.depth=1")
    command = [sys.executable, "-m", "opsin", "train", "quickstart", *keys, *few, "monitors.weights.every=1 step"]
    env = {**opsin_env, "PYTHONPATH": f"{tmp_path / 'site'}:{opsin_env['PYTHONPATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "data: found 64 images in images.npz" in done.stdout
    assert "the largest weight, " in done.stdout
    run = tmp_path / "runs" / "quickstart"
    assert "spread/std" in (run / "metrics.jsonl").read_text()
    assert (run / "latest.txt").read_text().startswith("step 2  ")

    (package / "latest.py").write_text("import a_package_that_is_missing")
    broken = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert broken.returncode == 2
    assert "opsin: extensions: its entry point latest = extensions_of_the_documents.latest" in broken.stderr
    assert broken.stderr.strip().endswith("repair or uninstall extensions")


def test_set_up_names_no_address() -> None:
    assert [str(path.relative_to(ROOT)) for path in tracked(*SETUP_FILES) if "://" in path.read_text()] == []


def test_no_file_names_one_machine() -> None:
    named = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if path != Path(__file__) and (PRIVATE_PATH.search(text) or f"{ROOT}/" in text):
            named.append(str(path.relative_to(ROOT)))
    assert named == []
