"""The environment that torch finds: waiting threads sleep, and memory of a GPU is reserved as it grows."""

import subprocess
import sys
from pathlib import Path

import pytest

IN_COMMANDS = ("-m", "opsin", "schema")
IN_PYTHON = ("-c", "import opsin; opsin.fit")

# Python imports a module of this name before the program begins.
WATCH = """
import os, sys

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch is imported with", os.environ.get("KMP_BLOCKTIME"), file=sys.stderr)

sys.meta_path.insert(0, Watch)
"""


def output(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("program", [IN_COMMANDS, IN_PYTHON])
@pytest.mark.parametrize(
    ("own", "spinning_ms"),
    [({}, "0"), ({"OMP_WAIT_POLICY": "active"}, None), ({"KMP_BLOCKTIME": "9"}, "9")],
)
def test_torch_is_imported_with_sleeping_threads_or_the_users_own_setting(
    program: tuple[str, ...], own: dict[str, str], spinning_ms: str | None, opsin_env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    environment = {**opsin_env, "PYTHONPATH": f"{tmp_path}:{opsin_env['PYTHONPATH']}", **own}
    assert output(environment, *program).stderr == f"torch is imported with {spinning_ms}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="torch has it on Linux")
@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", ""])
def test_memory_of_a_gpu_is_reserved_as_it_grows_unless_the_user_decides(own: str, opsin_env: dict[str, str]) -> None:
    environment = {name: value for name, value in opsin_env.items() if "ALLOC_CONF" not in name}
    environment |= {own: "max_split_size_mb:64"} if own else {}
    program = "import os, opsin; print({n: v for n, v in os.environ.items() if 'ALLOC_CONF' in n})"
    expected = {own: "max_split_size_mb:64"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert output(environment, "-c", program).stdout == f"{expected}\n"


def test_importing_opsin_imports_no_torch(opsin_env: dict[str, str]) -> None:
    assert output(opsin_env, "-c", "import sys, opsin; print('torch' in sys.modules)").stdout == "False\n"


def test_a_torch_that_is_imported_already_leaves_the_environment_alone(opsin_env: dict[str, str]) -> None:
    program = "import os, torch; before = dict(os.environ); import opsin; print(os.environ == before)"
    assert output(opsin_env, "-c", program).stdout == "True\n"
