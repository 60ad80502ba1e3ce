"""opsin trains vision models, with labels or without, from one YAML recipe."""

from typing import TYPE_CHECKING

from opsin.__version__ import __version__ as __version__

if TYPE_CHECKING:
    from opsin.assembly import assemble
    from opsin.export.encoder import Encoder
    from opsin.methods.base import Method, MethodConfig
    from opsin.recipe import Recipe, read
    from opsin.results import load
    from opsin.session import train
    from opsin.training.loop import Run, fit

__all__ = ["Encoder", "Method", "MethodConfig", "Recipe", "Run", "assemble", "fit", "load", "read", "train"]

_HOMES = {
    "assemble": "opsin.assembly",
    "train": "opsin.session",
    "Encoder": "opsin.export.encoder",
    "load": "opsin.results",
    "Method": "opsin.methods.base",
    "MethodConfig": "opsin.methods.base",
    "Recipe": "opsin.recipe",
    "read": "opsin.recipe",
    "Run": "opsin.training.loop",
    "fit": "opsin.training.loop",
}


def __getattr__(name: str) -> object:
    # Importing torch takes two seconds: `opsin --help` must not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'opsin' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
