"""What every test may ask for: the CIFAR-10 files, `opsin` as a user runs it, a small disk, a bucket."""

import os

# One thread for each process: the workers of pytest-xdist share the cores already. Set before torch
# is imported, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from tests.s3_server import BUCKET, S3Server

ROOT = Path(__file__).resolve().parent.parent


class RunOpsin(Protocol):
    """Runs `opsin` with these arguments to its end, in an environment of its own."""

    def __call__(
        self,
        *args: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 180,
    ) -> subprocess.CompletedProcess[str]: ...


class RunOnSmallDisk(Protocol):
    """What a Python program prints that is given a folder on a file system of `size` (as of mount) and `arguments`."""

    def __call__(self, program: str, *arguments: str, size: str) -> list[str]: ...


@pytest.fixture
def test_data() -> Path:
    """The folder that holds `cifar10/train.parquet` and `cifar10/test.parquet`."""
    folder = Path(os.environ.get("OPSIN_TEST_DATA") or ROOT.parent / "shared" / "data").resolve()
    if not (folder / "cifar10" / "train.parquet").is_file():
        pytest.skip(f"no cifar10/train.parquet in {folder}; set OPSIN_TEST_DATA to a folder that has it")
    return folder


@pytest.fixture
def opsin_env(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has set nothing: for tests that start and kill processes themselves."""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    return {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "src"), "LC_ALL": "C.UTF-8"}


@pytest.fixture
def run_opsin(tmp_path: Path, opsin_env: dict[str, str]) -> RunOpsin:
    def run(
        *args: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 180,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "opsin", *map(str, args)],
            cwd=cwd or tmp_path,
            env={**opsin_env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture
def torch_switches() -> Iterator[None]:
    """Puts torch's global switches back, for tests that train in this process."""
    import torch

    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    onednn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # not in torch's stubs
    places = [(cudnn, "deterministic"), (cudnn, "benchmark"), (cudnn, "allow_tf32"), (cuda, "allow_tf32")]
    places.append((onednn, "fp32_precision"))
    before = [getattr(owner, name) for owner, name in places]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
    for (owner, name), value in zip(places, before, strict=True):
        setattr(owner, name, value)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    if workspace is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A folder of its own in a bucket, and the environment to reach it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture
def run_on_small_disk(tmp_path: Path) -> RunOnSmallDisk:
    # In a mount namespace of its own: the small file system goes with the process, even if that is killed.
    def run(program: str, *arguments: str, size: str) -> list[str]:
        options = f"mount -t tmpfs -o size={size} tmpfs"
        mount = ["unshare", "--mount", "sh", "-c", f'{options} "$0" && exec "$@"', str(tmp_path)]
        if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [*mount, sys.executable, "-c", program, str(tmp_path), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process for each core that this one may use, by affinity and quota."""
    from opsin.processes.cores import num_cores

    return num_cores()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
