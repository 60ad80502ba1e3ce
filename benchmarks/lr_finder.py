"""Is the learning rate that `opsin tune lr` suggests a good one? Compared with the best of a grid.

    PYTHONPATH=src python benchmarks/lr_finder.py [--cifar10 FOLDER] [--only NAME ...] [--seeds 2] [--steps 200]

Every rate of a grid of factors of 3 trains a short run with the whole schedule; so does the rate that a sweep finds.
The score is top-1 on held-out images, the mean over the seeds. `as good` are the rates of the grid within one
percentage point of the best, about the spread of such short runs. `factor` is the distance of the suggestion from
the best rate, and from the nearest that is as good.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq

from interleaved import table
from opsin.errors import TrainingError
from opsin.reporting.console import open_console
from opsin.reporting.journal import read_rows
from opsin.run.lr_curve import Reading, read_curve
from opsin.run.recipe import read
from opsin.run.session import train_recipe
from opsin.run.sweep import choose_range, run_sweep

DIGITS_IMAGES = 1438
CIFAR10_IMAGES = 12_000
CIFAR10_SCORED = 2_000
AS_GOOD = 0.01
ADAMW_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SGD_GRID = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)

QUIET = ("checkpoints.every=never", "log.tensorboard=false", "log.csv=false", "log.plots=false")
PLAIN = (*QUIET, "device=cpu", "precision=fp32", "data.workers=0", "optim.schedule.warmup_epochs=0")
VIT = ("model.width=64", "model.depth=3")
CONVNET = ("model.name=convnet", "model.widths=[16,32,32]")
ADAMW, SGD = ("optim.name=adamw",), ("optim.name=sgd",)


@dataclass(frozen=True, slots=True)
class Setup:
    """A network on a data set with an optimizer."""

    keys: tuple[str, ...]
    images: int
    batch_size: int
    grid: tuple[float, ...]

    def overrides(self, seed: int) -> list[str]:
        """What makes `quickstart` this training."""
        return [*PLAIN, *self.keys, f"batch_size={self.batch_size}", f"seed={seed}"]


def setups(cifar10: Path) -> dict[str, Setup]:
    """Everything that is compared, by name."""
    scenes = {
        "digits": (("data.image_size=10",), DIGITS_IMAGES, 64),
        "cifar10": (
            (f"data.path={cifar10}", "data.image_size=32", "method.views.crop=padded", "method.views.flip=random"),
            CIFAR10_IMAGES,
            128,
        ),
    }
    patches = {"digits": "model.patch=2", "cifar10": "model.patch=8"}
    found: dict[str, Setup] = {}
    for scene, (keys, images, batch_size) in scenes.items():
        networks = {"vit": (*VIT, patches[scene]), "convnet": CONVNET}
        for network, optimizer in (("vit", "adamw"), ("convnet", "sgd"), ("convnet", "adamw"), ("vit", "sgd")):
            chosen, grid = (ADAMW, ADAMW_GRID) if optimizer == "adamw" else (SGD, SGD_GRID)
            found[f"{scene} {network} {optimizer}"] = Setup(
                (*keys, *networks[network], *chosen), images, batch_size, grid
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--only", nargs="*", default=[], help="setups to compare, such as 'digits vit adamw'")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200, help="updates of a training")
    parser.add_argument("--sweep", type=int, default=200, help="updates of a sweep")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        subset = Path(place, "cifar10")
        if arguments.cifar10 is not None:
            cut(arguments.cifar10, subset)
        rows = []
        for name, setup in setups(subset).items():
            if (arguments.only and name not in arguments.only) or ("cifar10" in name and not subset.exists()):
                continue
            rows += compare(name, setup, arguments)
    print(table(["", "best of grid", "top-1", "as good", "found", "top-1", "factor", "to as good"], rows))


def cut(source: Path, target: Path) -> None:
    """The first images of CIFAR-10: enough for runs of a minute."""
    target.mkdir()
    for name, count in (("train", CIFAR10_IMAGES), ("test", CIFAR10_SCORED)):
        pq.write_table(pq.read_table(source / f"{name}.parquet").slice(0, count), target / f"{name}.parquet")


def compare(name: str, setup: Setup, arguments: argparse.Namespace) -> list[list[str]]:
    """One row for each seed of the sweep."""
    seeds = range(arguments.seeds)
    scores = {lr: fmean(top1(setup, lr, seed, arguments.steps) for seed in seeds) for lr in setup.grid}
    print(f"{name}: " + "  ".join(f"{lr:g}: {score:.1%}" for lr, score in scores.items()), flush=True)
    best = max(scores, key=lambda lr: scores[lr])
    good = [lr for lr, score in scores.items() if score >= scores[best] - AS_GOOD]
    rows = []
    for seed in seeds:
        lr = sweep(setup, seed, arguments.sweep).suggestion
        row = [f"{name}, seed {seed}", f"{best:g}", f"{scores[best]:.1%}", f"{min(good):g} to {max(good):g}"]
        if lr is None:
            rows.append([*row, "no slope", "", "", ""])
            continue
        score = fmean(top1(setup, lr, each, arguments.steps) for each in seeds)
        nearest = min(max(lr, min(good)), max(good))
        rows.append([*row, f"{lr:g}", f"{score:.1%}", f"{apart(lr, best):.1f}", f"{apart(lr, nearest):.1f}"])
    return rows


def sweep(setup: Setup, seed: int, steps: int) -> Reading:
    """What a sweep over the default range says."""
    recipe = read("quickstart", setup.overrides(seed))
    swept = run_sweep(recipe, choose_range(recipe, None, None, steps), open_console(quiet=True))
    return read_curve(swept.rates, swept.losses, stopped=swept.stopped)


def top1(setup: Setup, lr: float, seed: int, steps: int) -> float:
    """The score after a run of `steps` updates; 0 where training failed."""
    epochs = steps / (setup.images // setup.batch_size)
    keys = [*setup.overrides(seed), f"optim.lr={lr}", f"epochs={epochs}", f"evaluators.val.every={steps} steps"]
    with tempfile.TemporaryDirectory() as place:
        try:
            train_recipe(read("quickstart", keys), Path(place, "run"), name="grid", quiet=True)
        except TrainingError:
            return 0.0
        values: Mapping[str, float] = {}
        for row in read_rows(Path(place, "run", "metrics.jsonl")):
            values = row.values
    return values["val/top1"]


def apart(one: float, other: float) -> float:
    """How many times the larger of two rates is the smaller."""
    return max(one / other, other / one)


if __name__ == "__main__":
    main()
