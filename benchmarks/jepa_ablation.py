"""What the hierarchy of H-JEPA and unbiased masks bring: I-JEPA against H-JEPA at equal compute.

    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/jepa_ablation.py --work digits --seeds 3 --minutes 1
    OMP_NUM_THREADS=1 PYTHONPATH=src python benchmarks/jepa_ablation.py --work cifar10 --data DIR --seeds 3 --minutes 15

Every variant gets `--minutes` of processor time (of all threads together) for each seed: updates of all variants are
timed in turns, and the epochs follow, in tenths. Schedules and their warm-up are stretched to them. The processor time
that training and its one evaluation took in the end stands in the table. Each seed holds out its own images of the
digits; CIFAR-10 has test images. Scores are those of the last step. What is done stays in `--out`, and is not done
again.

"Masks of L" are blocks of whole cells of 2^(L - 1) patches a side, as L levels need them: one level with such masks
says what they do without a hierarchy. One level is I-JEPA, bit for bit, with the masks of the recipe of H-JEPA.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from feature_baselines import Pixels, scores_of
from opsin.clock.schedule import Cosine
from opsin.data.base import Source
from opsin.data.loading import EvaluationData, LoadingPlan
from opsin.data.sources.labels import Opened
from opsin.data.sources.open import open_sources
from opsin.evaluation.labelled import LabelledImages
from opsin.reporting.journal import read_rows
from opsin.reporting.teller import CommandTeller
from opsin.run.images import open_images
from opsin.run.recipe import Recipe, read
from opsin.run.results import evaluate_run
from opsin.run.session import train_recipe
from opsin.storage.teller import Silence
from opsin.training.evaluator import LabelledChoice

QUIET = (
    "log.tensorboard=false",
    "log.plots=false",
    "log.csv=false",
    "checkpoints.every=never",
    "checkpoints.best=null",
    "evaluators.knn.every=never",
    "evaluators.linear.every=never",
    "evaluators.maps=null",
)
WORKS = {"digits": "digits", "cifar10": "cifar10-cpu"}
_TIMED = (10, 40)
"""Updates of two runs whose difference in time is that of the updates between."""
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to train."""

    name: str
    method: str
    changes: tuple[str, ...] = ()


PUBLISHED = ("method.masks.parity=published", "method.masks.min_context=8", "method.masks.context_keep=auto")
VARIANTS = [
    Variant("I-JEPA", "ijepa"),
    Variant("I-JEPA, published (biased) masks", "ijepa", PUBLISHED),
    Variant("H-JEPA, 1 level", "hjepa", ("method.levels=1",)),
    Variant("H-JEPA, 1 level, masks of 2", "hjepa", ("method.levels=1", "method.masks.coarsest=2")),
    Variant("H-JEPA, 1 level, masks of 3", "hjepa", ("method.levels=1", "method.masks.coarsest=4")),
    Variant("H-JEPA, 2 levels", "hjepa", ("method.levels=2",)),
    Variant("H-JEPA, 3 levels", "hjepa", ("method.levels=3",)),
]


@dataclass(frozen=True, slots=True)
class Scores:
    """Fractions in 0..1, and the processor time that they cost."""

    knn: float
    linear: float
    minutes: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=sorted(WORKS), default="digits")
    parser.add_argument("--data", help="CIFAR-10 as data.path wants it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1.0, help="processor time of each run (default: 1)")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="variants (default: all)")
    parser.add_argument("--out", type=Path, help="where runs are kept (default: runs/ablation-WORK)")
    arguments = parser.parse_args()
    out = arguments.out or Path("runs", f"ablation-{arguments.work}")
    out.mkdir(parents=True, exist_ok=True)
    data = () if arguments.data is None else (f"data.path={arguments.data}",)
    wanted = [variant for variant in VARIANTS if variant.name in arguments.only]
    recipes = {
        variant.name: [
            read(f"{variant.method}-{WORKS[arguments.work]}", [*QUIET, *data, *variant.changes, f"seed={seed}"])
            for seed in range(arguments.seeds)
        ]
        for variant in wanted
    }
    first = recipes[wanted[0].name]
    held_out = first if arguments.work == "digits" else first[:1]  # test images are the same for every seed
    rows = {"raw pixels": ("", [kept(out / f"pixels-{run.seed}.json", partial(score_pixels, run)) for run in held_out])}
    costs = seconds_per_epoch({name: seeds[0] for name, seeds in recipes.items()}, out / "seconds_per_epoch.json")
    for variant in wanted:
        epochs = max(1.0, round(60 * arguments.minutes / costs[variant.name], 1))
        place, runs = out / f"{variant.name}, {epochs:g} epochs", recipes[variant.name]
        found = [train_and_score(stretched(recipe, epochs), place / str(recipe.seed)) for recipe in runs]
        if variant is wanted[0]:
            places = [place / str(run.seed) for run in runs]
            fresh = [kept(out / f"fresh-{one.name}.json", partial(score_fresh, one)) for one in places]
            rows["the same network before training"] = ("", fresh)
        rows[variant.name] = (f"{epochs:g}", found)
        print(line(variant.name, *rows[variant.name]), flush=True)
    print(f"\n| features, {arguments.minutes:g} minutes of updates | epochs | processor time | k-NN | linear probe |")
    print("|---|---|---|---|---|")
    for name, (epochs_text, scores) in rows.items():
        print(line(name, epochs_text, scores))


def seconds_per_epoch(recipes: Mapping[str, Recipe], note: Path) -> Mapping[str, float]:
    """The processor time of an epoch of each, kept in `note`."""
    known: dict[str, float] = json.loads(note.read_text()) if note.exists() else {}
    missing = {name: recipe for name, recipe in recipes.items() if name not in known}
    spent: dict[str, list[float]] = {name: [] for name in missing}
    for number in range(_ROUNDS + 1):
        for name, recipe in missing.items():
            few, many = (processor_seconds(recipe, steps) for steps in _TIMED)
            if number:  # the first round pays for what a process does once
                spent[name].append((many - few) / (_TIMED[1] - _TIMED[0]))
    for name, recipe in missing.items():
        images = open_images(recipe, Silence()).facts.samples
        known[name] = statistics.median(spent[name]) * (images // recipe.batch_size)
    note.write_text(json.dumps(known))
    return known


def processor_seconds(recipe: Recipe, steps: int) -> float:
    """The processor time of so many updates and of what is around them."""
    limits = recipe.limits.model_copy(update={"steps": steps})
    short = recipe.model_copy(update={"limits": limits, "evaluators": {}, "monitors": {}})
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        train_recipe(short, Path(folder) / "run", name="timed", quiet=True)
        return time.process_time() - before


def stretched(recipe: Recipe, epochs: float) -> Recipe:
    """The recipe for so many epochs, its warm-up the same share of them."""
    assert recipe.epochs is not None
    assert isinstance(recipe.optim.schedule, Cosine)
    warmup = recipe.optim.schedule.warmup_epochs * epochs / recipe.epochs
    schedule = recipe.optim.schedule.model_copy(update={"warmup_epochs": warmup})
    optim = recipe.optim.model_copy(update={"schedule": schedule})
    return recipe.model_copy(update={"epochs": epochs, "optim": optim})


def train_and_score(recipe: Recipe, place: Path) -> Scores:
    """The scores at the end of a run; one that is there is not made again."""
    note = place / "processor_minutes.json"
    if not note.exists():
        before = time.process_time()
        train_recipe(recipe, place, name=place.parent.name, fresh=True, quiet=True)
        note.write_text(json.dumps((time.process_time() - before) / 60))
    last: Mapping[str, float] = list(read_rows(place / "metrics.jsonl"))[-1].values
    return Scores(last["knn/top1"], last["linear/top1"], json.loads(note.read_text()))


def kept(note: Path, score: Callable[[], Scores]) -> Scores:
    """The scores in `note`, or those that it gets."""
    if not note.exists():
        note.write_text(json.dumps(asdict(score())))
    return Scores(**json.loads(note.read_text()))


def score_fresh(run: Path) -> Scores:
    """The scores of the weights that a run began with."""
    reports = evaluate_run(run, ("knn", "linear"), weights="initial")
    knn, linear = (float(str(reports[name].as_dict()["top1"])) for name in reports)
    return Scores(knn, linear)


def score_pixels(recipe: Recipe) -> Scores:
    """The scores of the normalised pixels of a recipe's images."""
    images = open_images(recipe, Silence())

    def still(source: Source) -> EvaluationData:
        facts = images.facts
        own = replace(facts, classes=source.classes, samples=len(source), unlabelled=0)
        plan = LoadingPlan(source=source, facts=own, device=torch.device("cpu"), teller=CommandTeller())
        return EvaluationData(plan, resize=facts.image_size)

    def open_path(path: str) -> Opened:
        return open_sources(path, cache=Path(os.path.expanduser(recipe.data.cache)))

    labelled = LabelledImages(images.train, images.val, open_path=open_path, still=still)
    return Scores(*scores_of(Pixels(), labelled(LabelledChoice(), "data")))


def line(name: str, epochs: str, scores: Sequence[Scores]) -> str:
    """A row of the table: means over seeds, and the seeds."""
    minutes = [one.minutes for one in scores if one.minutes is not None]
    cells = [f"{statistics.mean(minutes):.1f} min" if minutes else ""]
    for values in ([100 * one.knn for one in scores], [100 * one.linear for one in scores]):
        seeds = ", ".join(f"{value:.1f}" for value in values)
        cells.append(f"{statistics.mean(values):.1f} % ({seeds})" if len(values) > 1 else f"{values[0]:.1f} %")
    return f"| {name} | {epochs} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
