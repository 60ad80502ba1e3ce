"""A training on the bundled digits that takes half a second."""

from collections.abc import Sequence
from pathlib import Path

from opsin.recipe import Recipe, read
from opsin.session import train_recipe
from opsin.training.loop import Run

SMALL_VIT = ("model.width=16", "model.depth=1", "model.heads=2", "model.dropout=0")
OVERRIDES = (
    "epochs=2",
    "batch_size=256",
    "precision=fp32",
    "device=cpu",
    "data.workers=0",
    "optim.lr=0.01",
    "optim.schedule.warmup_epochs=0",
    "checkpoints.every=1 epoch",
    "evaluators.val.every=1 epoch",
    "log.tensorboard=false",
    "log.csv=false",
)
STEPS_PER_EPOCH = 5
"""1,438 training images in batches of 256."""


def digits_recipe(*overrides: str, model: Sequence[str] = SMALL_VIT) -> Recipe:
    """The recipe `quickstart`, made small."""
    return read("quickstart", [*OVERRIDES, *model, *overrides])


def train_digits(out: Path, *overrides: str, model: Sequence[str] = SMALL_VIT) -> Run:
    """A finished run in `out`."""
    return train_recipe(digits_recipe(*overrides, model=model), out, name="quickstart", quiet=True)
