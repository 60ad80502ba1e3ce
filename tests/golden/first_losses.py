"""The first losses of small variants of the shipped recipes, in losses.json.

Renew them only where a change of the numbers is meant, and show the old and the new with it; this prints both:

    OMP_NUM_THREADS=1 PYTHONPATH=src:. python -m tests.golden.first_losses DIR [RECIPE ...]

DIR holds CIFAR-10 as data.path wants it. Without recipes all are renewed.
"""

import json
import sys
import tempfile
from pathlib import Path

from opsin.reporting.journal import read_rows
from opsin.run.recipe import read, read_draft
from opsin.run.session import train_recipe

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
    "log.plots=false",
    "log.csv=false",
    "checkpoints.every=never",
)
_SMALL_VIT = ("model.width=16", "model.depth=2", "model.heads=2")
# torch draws the masks of dropout with a library that other builds do not have.
_NO_DROPOUT = ("model.dropout=0", "model.attention_dropout=0", "model.drop_path=0")
_SMALL_CONVNET = ("model.widths=[8,16,16]", "optim.lr=0.02")
_SMALL_RESNET = ("model.name=resnet10t", "data.image_size=32", "data.eval_resize=32", "optim.lr=0.001")
_WHOLE_RUN = ("epochs=0.008",)
"""All stages within the first updates."""


def _sizes(*image_sizes: int) -> tuple[str, ...]:
    return tuple(
        text
        for number, size in enumerate(image_sizes)
        for text in (f"stages.{number}.image_size={size}", f"stages.{number}.batch_size=32")
    )


_SMALL_DINO = (
    "method.prototypes=64",
    "method.hidden=32",
    "method.bottleneck=16",
    "method.freeze_epochs=0.001",
    "optim.lr=0.01",
)
_DINO_SIZES: dict[str, tuple[str, ...]] = {
    "dino-imagenet-vits16": (
        "data.image_size=32",
        "data.eval_resize=32",
        "model.patch=4",
        "method.views.local_size=16",
    ),
}
_SMALL_JEPA = ("method.predictor_width=16", "method.predictor_depth=1", "optim.lr=0.01")
_JEPA_SIZES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "cifar10-cpu": (),
    "cifar10": (),
    "imagenet-vith14": ("data.image_size=32", "data.eval_resize=32", "model.patch=2"),
}
_HYBRID = (*_WHOLE_RUN, "stages.0.batch_size=32", "stages.3.batch_size=32")
VARIANTS: dict[str, tuple[str, ...]] = {
    "quickstart": (*_SMALL_VIT, *_NO_DROPOUT, "optim.lr=0.01"),
    "cifar10-vit": (*_SMALL_VIT, *_NO_DROPOUT, "data.image_size=16", "optim.lr=0.01"),
    "cifar10-vit-strong": (*_SMALL_VIT, *_NO_DROPOUT, "data.image_size=16", "optim.lr=0.01"),
    # Batch norm and Muon's bf16 carry roundings on: at these rates by a factor of two per update, not ten.
    "cifar10-cpu": (*_SMALL_CONVNET, *_WHOLE_RUN),
    "cifar10-cpu-40s": (*_SMALL_CONVNET, *_WHOLE_RUN),
    "cifar10-cpu-160s": (*_SMALL_CONVNET, *_WHOLE_RUN),
    "cifar10-standard": _SMALL_CONVNET,
    "folder": (*_SMALL_CONVNET, "model.name=convnet", "data.image_size=32"),
    "folder-finetune": (*_SMALL_RESNET, "model.weights=null"),
    "cifar10-finetune": (*_SMALL_CONVNET, *_WHOLE_RUN, "model.weights=null"),
    "cifar10-progressive": (*_SMALL_CONVNET, *_WHOLE_RUN),
    "cifar10-hybrid": (*_SMALL_CONVNET, *_HYBRID),
    "cifar10-hybrid-freeze": (*_SMALL_CONVNET, *_HYBRID),
    **{
        name: (*_SMALL_DINO, "model.width=16", "model.heads=2", "model.depth=2", "model.drop_path=0", *sizes)
        for name, sizes in _DINO_SIZES.items()
    },
    # Batch norm on grey images carries roundings on here too: at a rate of 0.01 they reach a thousandth of a loss.
    "dino-cifar10": (*_SMALL_DINO, "model.name=resnet10t", "model.stem=imagenet", "optim.lr=0.001"),
    # Muon's bf16 carries roundings on here too: at `other_lr` 0.01 they reach a thousandth of a loss.
    "dino-cifar10-cpu": (*_SMALL_DINO, "model.widths=[8,16,16]", "optim.other_lr=0.003"),
    "dino-folder": (
        *_SMALL_DINO,
        *("model.name=convnet", "model.widths=[8,16,16]", "data.image_size=32", "optim.other_lr=0.003"),
    ),
    "dino-digits": (*_SMALL_DINO, "model.widths=[8,16,16]", "optim.other_lr=0.003"),
    **{
        f"{kind}-{name}": (*_SMALL_JEPA, "model.width=16", "model.heads=2", "model.depth=2", *sizes)
        for kind in ("ijepa", "hjepa")
        for name, sizes in _JEPA_SIZES.items()
    },
    "imagenet-resnet50": _SMALL_RESNET,
    "imagenet-standard": _SMALL_RESNET,
    "imagenet-finetune": (*_SMALL_RESNET, *_WHOLE_RUN, "model.weights=null"),
    "imagenet-progressive": (*_SMALL_RESNET, *_WHOLE_RUN, *_sizes(16, 24, 32)),
    "imagenet-hybrid": (*_SMALL_RESNET, *_WHOLE_RUN, *_sizes(16, 24, 32, 32)),
    "imagenet-hybrid-freeze": (*_SMALL_RESNET, *_WHOLE_RUN, *_sizes(16, 24, 32, 32)),
}
NEEDS_COLOUR = {
    name for name in VARIANTS if name.startswith(("imagenet", "folder")) or VARIANTS[name][:1] == _SMALL_CONVNET[:1]
}
"""Variants trained on CIFAR-10: whitening and batch norm of grey images amplify roundings. The others scale digits."""


def first_losses(name: str, data: Path | str) -> list[float]:
    """`train/loss` of the first updates of a variant on the images at `data`."""
    unscored = [f"evaluators.{prefix}=null" for prefix in read_draft(name).evaluators]
    recipe = read(name, [*_EVERYWHERE, *unscored, *VARIANTS[name], f"data.path={data}"])
    with tempfile.TemporaryDirectory(prefix="opsin-golden-") as folder:
        train_recipe(recipe, Path(folder), name=name, quiet=True)
        return [row.values["train/loss"] for row in read_rows(Path(folder) / "metrics.jsonl")]


def main(cifar10: Path, *names: str) -> None:
    """Write the losses of this machine, and print what was there before."""
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    after = {name: before[name] for name in VARIANTS if name in before}
    for name in names or VARIANTS:
        losses = first_losses(name, cifar10 if name in NEEDS_COLOUR else "digits")
        after[name] = [round(loss, 6) for loss in losses]
        print(name, f"  before {before.get(name)}", f"  after  {after[name]}", sep="\n")
    lines = [f"  {json.dumps(name)}: {json.dumps(losses)}" for name, losses in after.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
