"""Systems other than Linux on x86: nothing is imported or asked for that only these have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsin.processes.cores import num_cores
from opsin.training import precision

# A process without /proc, /sys, /dev/shm, glibc, affinity, oneDNN and names of the chip's instructions. An audit hook
# sees every file that Python opens; torch's own code may still read them.
_ELSEWHERE = """
import ctypes, os, pkgutil, sys, importlib
import torch

def nowhere(path):
    return str(path).startswith(("/proc", "/sys", "/dev/shm"))

def refuse(event, arguments):
    if event == "open" and nowhere(arguments[0]):
        raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))
    if event == "ctypes.dlopen" and arguments[0] == "libc.so.6":
        raise OSError("no glibc here")

def without(function):
    def call(path, *rest, **more):
        if nowhere(path):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return function(path, *rest, **more)
    return call

for name in ("statvfs", "readlink", "stat"):
    setattr(os, name, without(getattr(os, name)))
for name in ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "fdatasync", "sendfile"):
    if hasattr(os, name):
        delattr(os, name)
torch.cpu.get_capabilities = lambda: {"architecture": "aarch64"}
torch.backends.mkldnn.is_available = lambda: False
sys.addaudithook(refuse)

import opsin
for module in pkgutil.walk_packages(opsin.__path__, "opsin."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from opsin.commands.main import main
main()
"""


def test_a_run_needs_nothing_of_linux_or_x86(tmp_path: Path, opsin_env: dict[str, str]) -> None:
    settings = ["limits.steps=3", "data.workers=0", "log.plots=false", "batch_size=64"]
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, "train", "quickstart", "--out", str(tmp_path / "run"), *settings],
        env=opsin_env,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said = done.stdout + done.stderr
    # What is not known is not claimed.
    assert "oneDNN" not in said
    assert "glibc" not in said
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(("platform", "factor"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(platform: str, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(sys, "platform", platform)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 0 <= precision.peak_memory_bytes(torch.device("cpu")) - peak * factor <= peak * factor / 10


def test_cores_are_all_of_them_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert num_cores(tmp_path) == 3


@pytest.mark.parametrize("found", [{"architecture": "aarch64", "neon": True, "bf16": True}, {"sve_bf16": True}])
def test_auto_says_that_bf16_of_arm_is_untried(found: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    choice = precision.choose_precision("auto", torch.device("cpu"))
    assert (choice.value, "untried" in choice.reason) == ("fp32", True)
