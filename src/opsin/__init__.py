"""opsin trains vision models, with labels or without, from one YAML recipe."""

import os
import sys
from typing import TYPE_CHECKING

from opsin.__version__ import __version__ as __version__

if TYPE_CHECKING:
    from opsin.export.encoder import Encoder
    from opsin.methods.base import Method, MethodConfig
    from opsin.run.assemble import assemble
    from opsin.run.parts import build_parts
    from opsin.run.recipe import Recipe, read
    from opsin.run.results import load
    from opsin.run.session import train
    from opsin.training.loop import Run, fit

__all__ = [
    "Encoder",
    "Method",
    "MethodConfig",
    "Recipe",
    "Run",
    "assemble",
    "build_parts",
    "fit",
    "load",
    "read",
    "train",
]

_HOMES = {
    "assemble": "opsin.run.assemble",
    "build_parts": "opsin.run.parts",
    "train": "opsin.run.session",
    "Encoder": "opsin.export.encoder",
    "load": "opsin.run.results",
    "Method": "opsin.methods.base",
    "MethodConfig": "opsin.methods.base",
    "Recipe": "opsin.run.recipe",
    "read": "opsin.run.recipe",
    "Run": "opsin.training.loop",
    "fit": "opsin.training.loop",
}

# The OpenMP of LLVM and Intel, which some builds of torch use, reads this once: waiting threads sleep. libgomp ignores
# it; there processes/openmp.py decides while a run goes on.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["KMP_BLOCKTIME"] = "0"

# Memory of a GPU is reserved as it grows, not in blocks of fixed sizes, a tenth of which is never used. torch reads
# this when a tensor is first made there. Other systems than Linux do not have it.
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
if "torch" not in sys.modules and sys.platform == "linux" and not _ALLOCATOR & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def __getattr__(name: str) -> object:
    # Importing torch takes two seconds: `opsin --help` must not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
