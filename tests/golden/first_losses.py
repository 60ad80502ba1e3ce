"""The first losses of small variants of the shipped recipes, in losses.json.

Renew them only where a change of the numbers is meant, and show the old and the new with it; this prints both:

    OMP_NUM_THREADS=1 PYTHONPATH=src:. python -m tests.golden.first_losses DIR

DIR holds CIFAR-10 as data.path wants it.
"""

import json
import sys
import tempfile
from pathlib import Path

from opsin.recipe import read
from opsin.reporting import read_rows
from opsin.session import train_recipe

FILE = Path(__file__).with_name("losses.json")
STEPS = 10

# What makes a recipe small and its arithmetic plain.
_EVERYWHERE = (
    "data.holdout=0",
    "data.resident=false",
    "data.workers=0",
    "device=cpu",
    "precision=fp32",
    "batch_size=32",
    "epochs=1",
    "optim.schedule.warmup_epochs=0",
    f"limits.steps={STEPS}",
    "log.every=1",
    "log.tensorboard=false",
    "log.csv=false",
    "checkpoints.every=never",
    "evaluators.val=null",
)
_SMALL_VIT = ("model.width=16", "model.depth=2", "model.heads=2")
# torch draws the masks of dropout with a library that other builds do not have.
_NO_DROPOUT = ("model.dropout=0", "model.attention_dropout=0", "model.drop_path=0")
VARIANTS = {
    "quickstart": (*_SMALL_VIT, *_NO_DROPOUT, "optim.lr=0.01"),
    "cifar10-vit": (*_SMALL_VIT, *_NO_DROPOUT, "data.image_size=16", "optim.lr=0.01"),
    "cifar10-vit-strong": (*_SMALL_VIT, *_NO_DROPOUT, "data.image_size=16", "optim.lr=0.01"),
    # Batch norm and Muon's bf16 carry roundings on: at these rates by a factor of two per update, not ten.
    "cifar10-cpu": ("model.widths=[8,16,16]", "optim.lr=0.02"),
    "imagenet-resnet50": ("model.name=resnet10t", "data.image_size=32", "data.eval_resize=32", "optim.lr=0.001"),
}
NEEDS_COLOUR = {"cifar10-cpu", "imagenet-resnet50"}
"""Variants trained on CIFAR-10: whitening and batch norm of grey images amplify roundings. The others scale digits."""


def first_losses(name: str, data: Path | str) -> list[float]:
    """`train/loss` of the first updates of a variant on the images at `data`."""
    recipe = read(name, [*_EVERYWHERE, *VARIANTS[name], f"data.path={data}"])
    with tempfile.TemporaryDirectory(prefix="opsin-golden-") as folder:
        train_recipe(recipe, Path(folder), name=name, quiet=True)
        return [row.values["train/loss"] for row in read_rows(Path(folder) / "metrics.jsonl")]


def main(cifar10: Path) -> None:
    """Write the losses of this machine, and print what was there before."""
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    after = {}
    for name in VARIANTS:
        losses = first_losses(name, cifar10 if name in NEEDS_COLOUR else "digits")
        after[name] = [round(loss, 6) for loss in losses]
        print(name, f"  before {before.get(name)}", f"  after  {after[name]}", sep="\n")
    lines = [f"  {json.dumps(name)}: {json.dumps(losses)}" for name, losses in after.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
