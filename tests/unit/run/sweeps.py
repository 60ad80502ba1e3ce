"""Recipes whose learning rate is swept in seconds."""

import io

from opsin.reporting.console import Console, open_console
from opsin.run.recipe import Recipe, read
from tests.digits_run import CONVNET, OVERRIDES

KEYS = (*(key for key in OVERRIDES if not key.startswith("optim.lr")), *CONVNET, "batch_size=64", "log.plots=false")
"""A convolutional network that learns digits in a hundred updates."""
SGD = ("optim.name=sgd", "optim.weight_decay=0")
STEPS = 100


def quiet() -> Console:
    return open_console(quiet=True, stream=io.StringIO())


def small(*overrides: str) -> Recipe:
    return read("quickstart", [*KEYS, *overrides])
