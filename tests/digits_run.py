"""A training on the bundled digits that takes half a second."""

from collections.abc import Sequence
from pathlib import Path

from opsin.run.recipe import Recipe, read
from opsin.run.session import train_recipe
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
    "log.plots=false",
)
BROKEN_UP = (
    "batch_size=64",
    "epochs=2",
    "data.holdout=0.4",
    "data.workers=0",
    "accumulate=2",
    "checkpoints.every=5 steps",
    "evaluators.val.every=1 epoch",
    "log.every=4",
    "log.tensorboard=false",
    "log.plots=false",
)
"""16 steps make an epoch: most checkpoints fall into the middle of one."""
VIT = ("model.width=16", "model.depth=2", "model.heads=2", "model.dropout=0.1", "model.drop_path=0.2")
CONVNET = ("model.name=convnet", "model.widths=[8,8,8]", "data.image_size=10")
OF_THE_MACHINE = ("train/images_per_s", "time/", "gpu/", "system/")
"""How names of values begin that no two runs have in common."""
STEPS_PER_EPOCH = 5
"""1,438 training images in batches of 256."""


def digits_recipe(*overrides: str, model: Sequence[str] = SMALL_VIT) -> Recipe:
    """The recipe `quickstart`, made small."""
    return read("quickstart", [*OVERRIDES, *model, *overrides])


def train_digits(out: Path, *overrides: str, model: Sequence[str] = SMALL_VIT) -> Run:
    """A finished run in `out`."""
    return train_recipe(digits_recipe(*overrides, model=model), out, name="quickstart", quiet=True)


def staged(small: int) -> tuple[str, ...]:
    """Keys for stages that begin with steps 0, 5 and 13 of `BROKEN_UP`, with everything that a stage can change.

    The first has images of `small` pixels.
    """
    return (
        "epochs=null",
        f"stages=[{{epochs: 1, image_size: {small}, batch_size: 96, data_fraction: 0.5}},"
        " {epochs: 0.5, train: [head.*]}, {epochs: 1, mix: false, label_smoothing: 0.2, lr_scale: 0.5}]",
        "method.mix={mixup: 0.4, cutmix: 1.0, until: 0.9}",
        "ema.decay=0.9",
        "optim.schedule={name: onecycle, momentum: [0.95, 0.85]}",
        "optim.layer_decay=0.8",
    )
