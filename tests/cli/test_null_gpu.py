"""`opsin train` on a GPU that does nothing: torch's code for CUDA and its allocator run, kernels compute nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "nullgpu"
# A network that needs 2 GiB for 128 images of a batch of 512.
RUN = (
    *("train", "quickstart", "batch_size=512", "data.image_size=32", "model.patch=2", "model.width=512"),
    *("model.depth=8", "model.heads=8", "evaluators.val=null", "limits.steps=5", "memory.fit=off"),
    *("log.plots=false", "log.tensorboard=false", "--out"),
)


@pytest.mark.slow
def test_a_gpu_that_is_too_small_is_not_waited_for_and_the_update_is_split(
    tmp_path: Path, opsin_env: dict[str, str]
) -> None:
    environment = {**opsin_env, "PYTHON": sys.executable, "NULLGPU": str(tmp_path / "built"), "NULLGPU_GIB": "2"}
    command = [str(BENCHMARK / "run.sh"), str(BENCHMARK / "train.py"), *RUN, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.stderr.startswith("run.sh: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "out of memory with 512 images at a time: from here on it is 256" in done.stdout + done.stderr
    stored = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert [one["step"] for one in stored["splits"]] == [0]
    head, waits = done.stdout.partition("kernels a step; waits in ")[::2]
    assert "exit status 0, 5 updates" in head
    first, *lines = waits.splitlines()
    assert first == "3 steps:"
    assert all("training/observe.py" in line for line in lines), "a row is read; nothing else waits"
