"""The first hour of a stranger with pictures: every recipe is checked, and runs that fit their time are scored.

    PYTHONPATH=src python benchmarks/first_hour.py pictures --cifar10 DIR --out PICTURES
    PYTHONPATH=src python benchmarks/first_hour.py check --cifar10 DIR --pictures PICTURES
    PYTHONPATH=src python benchmarks/first_hour.py fit --pictures PICTURES --minutes 20 --seeds 3 --out RUNS

`pictures` writes images of CIFAR-10 as JPEG files in class folders, enlarged. `check` runs `opsin check` on every
shipped recipe, with pictures that suit it. `fit` trains recipes (--recipes) for a time and prints their scores
and how long they took; one without open keys gets the epochs that fit by `opsin plan`.
"""

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from opsin.run.recipe import read_draft, shipped
from opsin.storage.table import aligned

_OPSIN = (sys.executable, "-m", "opsin")
_KNN = ("evaluators.knn.name=knn", "evaluators.knn.every=1000 epochs", "data.holdout=0.1")


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["pictures", "check", "fit"])
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--cifar10", type=Path, help="the folder with train.parquet and test.parquet")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    if asked.part == "pictures":
        write_pictures(asked.cifar10, asked.out, asked.count, asked.side)
    elif asked.part == "check":
        print("\n".join(aligned(list(check_all(asked.cifar10, asked.pictures, asked.recipes)))))
    else:
        rows = fit_all(asked.recipes or ["folder", "dino-folder"], asked)
        print("\n".join(aligned([("recipe", "seed", "minutes", "of its budget", "scores"), *rows])))


def write_pictures(cifar10: Path, out: Path, count: int, side: int) -> None:
    """Write the first `count` training images, and a fifth as many test images, into class folders."""
    for part, wanted in (("train", count), ("val", count // 5)):
        table = pq.read_table(cifar10 / f"{'train' if part == 'train' else 'test'}.parquet").slice(0, wanted)
        image_column = next(name for name in table.column_names if name.startswith(("im", "pic")))
        label_column = next(name for name in table.column_names if name != image_column)
        for number, (stored, label) in enumerate(
            zip(table[image_column].to_pylist(), table[label_column].to_pylist(), strict=True)
        ):
            folder = out / part / f"class-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            with Image.open(io.BytesIO(stored["bytes"] if isinstance(stored, dict) else stored)) as image:
                enlarged = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            enlarged.save(folder / f"{number:05d}.jpg", quality=90)


def check_all(cifar10: Path, pictures: Path, wanted: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """A row for each shipped recipe: its faults, what deserves a look, and the time."""
    yield ("recipe", "faults", "looks", "seconds", "what")
    for name in wanted or sorted(path.stem for path in shipped.glob("*.yaml")):
        draft = read_draft(name)
        data = {"digits": "digits", "cifar10": str(cifar10)}.get(draft.data.path, str(pictures))
        weights = ["model.weights=null"] if draft.model.weights else []  # there is nothing to download from here
        command = [*_OPSIN, "check", name, f"data.path={data}", *weights, "--out", f"runs-to-come/{name}", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.stdout:
            yield (name, "?", "?", "?", done.stderr.strip().splitlines()[-1])
            continue
        report = json.loads(done.stdout)
        noted = [one for one in report["checks"] if one["level"] != "fine"]
        looks = sum(one["level"] == "look" for one in noted)
        what = "; ".join(f"{one['name']}: {one['text']}" for one in noted)
        yield (name, str(report["faults"]), str(looks), f"{report['seconds']:.0f}", what)


def fit_all(recipes: Sequence[str], asked: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each recipe and seed."""
    rows: list[tuple[str, ...]] = []
    for recipe in recipes:
        for seed in range(asked.seeds):
            run = asked.out / f"{recipe}-{asked.pictures.name}-{asked.minutes:g}-{seed}"
            keys = [f"data.path={asked.pictures}", f"seed={seed}", "log.tensorboard=false", "log.plots=false"]
            if recipe.startswith("dino"):
                keys += _KNN
            keys += _for_the_time(recipe, keys, asked.minutes)
            started = time.monotonic()
            subprocess.run([*_OPSIN, "train", recipe, *keys, "--out", str(run), "--quiet", "--fresh"], check=True)
            minutes = (time.monotonic() - started) / 60
            scores = json.loads((run / "summary.json").read_text())["scores"]
            shown = "  ".join(f"{name} {one['last']:.4f}" for name, one in scores.items() if name.endswith("top1"))
            rows.append((recipe, str(seed), f"{minutes:.1f}", f"{minutes / asked.minutes:.0%}", shown))
            print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _for_the_time(recipe: str, keys: Sequence[str], minutes: float) -> list[str]:
    """The budget of a recipe with open keys; else the epochs that fit, by a plan of one epoch."""
    if read_draft(recipe).open_keys:
        return [f"limits.minutes={minutes:g}"]
    command = [*_OPSIN, "plan", recipe, *keys, "epochs=1", "optim.schedule.warmup_epochs=0", "--json"]
    plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    epochs = max(1, int((0.96 * 60 * minutes - plan["start_s"]) / (plan["seconds"] - plan["start_s"])))
    return [f"epochs={epochs}", f"optim.schedule.warmup_epochs={epochs / 20:g}"]


if __name__ == "__main__":
    main()
