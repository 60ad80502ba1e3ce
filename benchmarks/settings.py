"""Run the tests as on other chips, with other numbers of threads, and with other versions of the dependencies.

    python benchmarks/settings.py                                  # all tests in all settings: hours
    python benchmarks/settings.py tests/golden tests/unit/nn       # a part
    python benchmarks/settings.py --only avx2,2-threads tests/golden
    python benchmarks/settings.py --only torch-2.11,lowest --environments ~/venvs

Prints one row a setting: tests passed, failed and skipped, and the names of those that failed; ends with status 1 if
any did. A chip ignores a setting that allows more than it has. Environments are made where they are missing, in several
minutes and 6 GB each (`--environments`); the other settings take the Python that runs this.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SETTINGS: dict[str, dict[str, str]] = {
    "as-it-is": {},
    "2-threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    **{f"aten-{name}": {"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2", "avx512")},
    **{
        f"onednn-{name.lower()}": {"ONEDNN_MAX_CPU_ISA": name}
        for name in ("SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_AMX")
    },
    **{f"mkl-{name.lower()}": {"MKL_CBWR": name} for name in ("COMPATIBLE", "AVX2")},
    "sse4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
}
_TORCH_211 = ("torch==2.11.*", "torchvision==0.26.*", "torchcodec==0.16.*")
_TEST_TOOLS = ("pytest>=9", "hypothesis", "pytest-xdist", "moto[s3]>=5.2", "flask", "flask-cors", "hatchling>=1.27")
ENVIRONMENTS = ("torch-2.11", "lowest")
"""The oldest torch with the newest of everything else, and the oldest versions that pyproject.toml allows."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of the tests in one setting."""

    passed: int
    failed: tuple[str, ...]
    skipped: int


def run_tests(python: Path, setting: Mapping[str, str], tests: list[str], processes: int) -> Outcome:
    """Run `tests` with the interpreter `python` and the variables of `setting`, one thread unless it says otherwise."""
    with tempfile.TemporaryDirectory(prefix="opsin-settings-") as folder:
        report = Path(folder) / "report.xml"
        command: list[str | Path] = [
            python,
            "-m",
            "pytest",
            "-q",
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        if processes > 1:
            command += ["-n", str(processes), "--dist", "worksteal"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **_ONE_THREAD, **setting}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if not report.exists():
            return Outcome(0, (f"pytest ended with status {done.returncode}: {_last_line(done)}",), 0)
        cases = list(ET.parse(report).iter("testcase"))
    broken = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = tuple(f"{case.get('classname')}::{case.get('name')}" for case in broken)
    if done.returncode > 1 and not failed:
        failed = (f"pytest ended with status {done.returncode}: {_last_line(done)}",)
    return Outcome(len(cases) - len(broken) - skipped, failed, skipped)


def make_environment(name: str, folder: Path) -> Path:
    """Return the interpreter of the environment `name` in `folder`, which is made if it is missing."""
    home = folder / name
    python = home / "bin" / "python"
    finished = home / "opsin-is-installed"
    if finished.exists():
        return python
    print(f"making the environment {home}", file=sys.stderr)
    venv.create(home, with_pip=True, clear=True)
    if name == "lowest":
        _call(python, "-m", "pip", "install", "-q", "uv")
        uv: list[str | Path] = [python, "-m", "uv", "pip", "install", "-q", "--python", python]
        _call(*uv, "--resolution", "lowest-direct", "-e", ROOT)
        _call(*uv, *_TEST_TOOLS)
    else:
        _call(python, "-m", "pip", "install", "-q", *_TORCH_211, *_TEST_TOOLS, "-e", ROOT)
    finished.touch()
    return python


def _call(*command: str | Path) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: status {done.returncode}; mend that and run this again")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[-1] if lines else "no output"


def main() -> None:
    known = (*SETTINGS, *ENVIRONMENTS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="files and folders of tests; all of them by default")
    parser.add_argument("--only", help=f"settings with commas between them, of {', '.join(known)}")
    parser.add_argument("--environments", type=Path, default=ROOT / ".scratch", help="folder of the environments")
    parser.add_argument("--processes", type=int, default=1, help="processes of pytest-xdist")
    given = parser.parse_args()
    chosen = given.only.split(",") if given.only else list(known)
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"unknown settings {', '.join(unknown)}; known: {', '.join(known)}")
    print("| setting | passed | failed | skipped | minutes | failures |\n|---|---|---|---|---|---|", flush=True)
    failures = 0
    for name in chosen:
        python = make_environment(name, given.environments) if name in ENVIRONMENTS else Path(sys.executable)
        started = time.monotonic()
        found = run_tests(python, SETTINGS.get(name, {}), given.tests, given.processes)
        failures += len(found.failed)
        minutes = (time.monotonic() - started) / 60
        numbers = f"{found.passed} | {len(found.failed)} | {found.skipped} | {minutes:.1f}"
        print(f"| {name} | {numbers} | {'<br>'.join(found.failed)} |", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
