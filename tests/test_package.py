"""What is published works without the repository: the source archive builds, and the wheel made from it trains."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from opsin.__version__ import __version__

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src" / "opsin"


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command whose environment does not lead to the repository."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "OPSIN", "PIP"))}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """A wheel that is built from the source archive alone."""
    build = (sys.executable, "-m", "hatchling", "build", "--directory", folder, "--target")
    run(*build, "sdist", cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    run(*build, "wheel", cwd=folder / archive.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment with the wheel; gives its site-packages. Nothing else is installed.

    What the wheel needs is taken from the environment of this test, without our sources: of a folder that is named in
    a `.pth` file no `.pth` files are read, and one of these is how an editable installation finds its sources.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel, cwd=folder)
    (site,) = folder.glob("lib/*/site-packages")
    (site / "needed.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return site


def test_the_wheel_alone_lists_recipes_and_trains_one(tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    environment = tmp_path / "environment"
    site = make_environment(environment, build_wheel(tmp_path / "built"))

    assert {path.name for path in site.iterdir()} == {"needed.pth", "opsin", f"opsin-{__version__}.dist-info"}
    held = {path.relative_to(site / "opsin") for path in site.glob("opsin/**/*") if path.is_file()}
    ours = {path.relative_to(SOURCES) for path in SOURCES.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert held == ours
    assert {Path("py.typed"), Path("recipes", "quickstart.yaml")} <= held
    assert list(site.glob("*.dist-info/licenses/LICENSE"))

    imported = run(environment / "bin" / "python", "-c", "import opsin; print(opsin.__file__)", cwd=tmp_path)
    assert Path(imported).is_relative_to(site)
    opsin = environment / "bin" / "opsin"
    listed = {line.split()[0] for line in run(opsin, "recipes", cwd=tmp_path).splitlines()}
    assert listed == {path.stem for path in SOURCES.glob("recipes/*.yaml")}
    keys = ("limits.steps=2", "device=cpu", "data.workers=0", "log.tensorboard=false", "log.plots=false")
    assert run(opsin, "train", "quickstart", *keys, "--out", "run", "--quiet", cwd=tmp_path) == ""
    assert (tmp_path / "run" / "model.safetensors").is_file()
