"""The same losses with the instructions of older chips, and with two threads: benchmarks/settings.py for all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.first_losses import FILE
from tests.golden.test_first_losses import TOLERANCE

ROOT = Path(__file__).resolve().parents[2]
# Whitening, convolutions and Muon; attention, masks and Muon.
RECIPES = ("dino-digits", "hjepa-digits")
SETTINGS = {
    "no AVX, one thread": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "AVX2, two threads": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "AVX2",
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
    },
}
_PROGRAM = """
import json, sys
from tests.golden.first_losses import first_losses
print(json.dumps({name: first_losses(name, "digits") for name in sys.argv[1:]}))
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_first_losses_are_those_of_every_chip(setting: str) -> None:
    # These variables are read when torch is loaded.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **SETTINGS[setting]}
    command = [sys.executable, "-c", _PROGRAM, *RECIPES]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    golden = json.loads(FILE.read_text())
    for name, losses in json.loads(done.stdout.splitlines()[-1]).items():
        assert losses == pytest.approx(golden[name], rel=TOLERANCE)
