"""The forecast of peak memory against what a training of a few steps held, recipe by recipe.

    python benchmarks/memory_forecast.py --cifar10 DIR --pictures DIR [--steps 3] [RECIPE ...]

Each recipe trains in a process of its own, with its own batches, checkpoints and scores, and of its stages the one
with the most pixels. The measured peak is `peak_memory_bytes` of its summary.json: ru_maxrss of the training process on
a CPU, max_memory_allocated on a GPU. A recipe that fits only in parts is measured in these parts. Pictures of any
kind stand in for ImageNet: their number changes the images that stay in memory, and little else.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CHILD = """
import json, sys, time
from pathlib import Path
from opsin.run import fit, session
from opsin.run.forecast import forecast_memory
from opsin.run.recipe import read

found = {}
choose = fit.fit_memory

def look(parts, teller, **asked):
    fitting = choose(parts, teller, **asked)
    started = time.perf_counter()
    forecast = forecast_memory(fitting)
    found.update(
        seconds=time.perf_counter() - started,
        peak=forecast.peak_bytes,
        moment=forecast.moment,
        images=forecast.images,
        parts={part.name: part.num_bytes for part in forecast.parts},
        unknown=forecast.unknown,
    )
    return fitting

fit.fit_memory = look
out, recipe = Path(sys.argv[1]), read(sys.argv[2], sys.argv[3:])
if recipe.stages:  # the one that is foreseen: the others need less
    batch_size, side = recipe.batch_size, recipe.data.image_size
    sizes = [(one.batch_size or batch_size) * (one.image_size or side) ** 2 for one in recipe.stages]
    recipe = recipe.model_copy(update={"stages": [recipe.stages[sizes.index(max(sizes))]], "epochs": None})
session.train_recipe(recipe, out, name="measured", quiet=True)
print(json.dumps({**found, "measured": json.loads((out / "summary.json").read_text())["peak_memory_bytes"]}))
"""
SMALL = ("quickstart", "dino-digits", "ijepa-digits", "hjepa-digits")
CIFAR10 = (
    *("cifar10-cpu", "cifar10-cpu-160s", "cifar10-cpu-40s", "cifar10-standard", "cifar10-progressive"),
    *("cifar10-hybrid", "cifar10-hybrid-freeze", "cifar10-vit", "cifar10-vit-strong"),
    *("dino-cifar10-cpu", "dino-cifar10", "ijepa-cifar10-cpu", "ijepa-cifar10", "hjepa-cifar10-cpu", "hjepa-cifar10"),
)
PICTURES = ("dino-imagenet-vits16",)


def main() -> None:
    parser = argparse.ArgumentParser(description="The forecast of peak memory against what a training held.")
    parser.add_argument("recipes", nargs="*", help="shipped recipes; all that fit without")
    parser.add_argument("--cifar10", help="the folder of CIFAR-10, for its recipes")
    parser.add_argument("--pictures", help="a folder of photographs, for the other recipes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further changes of each recipe")
    asked = parser.parse_args()
    recipes = asked.recipes or [
        *SMALL,
        *(CIFAR10 if asked.cifar10 else ()),
        *(PICTURES if asked.pictures else ()),
    ]
    print(f"{'recipe':<24}{'images':>7}{'foreseen':>10}{'measured':>10}{'ratio':>7}{'took':>7}  moment")
    for recipe in recipes:
        _measure(recipe, asked)


def _measure(recipe: str, asked: argparse.Namespace) -> None:
    path = None if recipe in SMALL else asked.cifar10 if "cifar10" in recipe else asked.pictures
    changes = [f"limits.steps={asked.steps}", *asked.set, *([f"data.path={path}"] if path else [])]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _CHILD, str(Path(folder, "run")), recipe, *changes]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(
            f"{recipe:<24} failed after {time.perf_counter() - started:.0f} s: {done.stderr.strip().splitlines()[-1]}"
        )
        return
    found = json.loads(done.stdout.splitlines()[-1])
    foreseen, measured = found["peak"] / 2**20, found["measured"] / 2**20
    print(
        f"{recipe:<24}{found['images']:>7}{foreseen:>10,.0f}{measured:>10,.0f}{foreseen / measured:>7.2f}"
        f"{found['seconds']:>6.1f}s  {found['moment']}{' ' + found['unknown'] if found['unknown'] else ''}",
        flush=True,
    )


if __name__ == "__main__":
    main()
