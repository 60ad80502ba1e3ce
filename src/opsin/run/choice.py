"""Keys that say `auto`: the network, the size of its images, the batch and the epochs that fit the time.

The numbers follow from the number and the size of the pictures, `limits.minutes`, and the pace of this machine. They
are found once, before a run begins, and written into its recipe: a resume takes them from there.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from opsin.data.base import Source
from opsin.data.holdout import Subset
from opsin.data.quarantine import read_or_replace
from opsin.errors import ConfigError, TrainingError
from opsin.processes.cores import num_cores
from opsin.reporting.console import duration
from opsin.run.images import Images, open_images
from opsin.run.pace import Pace, measure_pace
from opsin.run.recipe import Draft, Recipe, read, read_draft
from opsin.run.sizes import SIZES, Size
from opsin.run.threads import choose_threads
from opsin.settings.text import flatten
from opsin.storage.teller import Silence, Teller
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.precision import choose_device
from opsin.training.stages import plan_time

_MINUTES = {"cpu": 20.0, "cuda": 60.0}
_FEWEST_VIEWS, _MOST_VIEWS = 300_000, 5_000_000
"""Images that a network of any size must see, and those after which more bring little; epochs follow from them."""
_FEWEST_EPOCHS, _MOST_EPOCHS = (5, 60), (100, 500)
"""Bounds of the epochs that follow from these views: at many images, at few."""
_FROM_WEIGHTS = 0.1
"""Share of these views and epochs for a network that starts from weights."""
_SCORES = 20
"""Evaluations and checkpoints of a run with many short epochs."""
_BATCHES_OF_AN_EPOCH = 50
_SAMPLED = 32
"""Pictures whose sides are looked at."""
_PROBE, _FINAL = (1 / 800, 1.5), (1 / 150, 8.0)
"""Time of a measurement, as a share of the time of the run and in seconds at most."""
_MARGIN = 0.96
"""Share of the minutes that is planned: the last checkpoint and the files of the run take the rest."""
_ENCODED = 1.3
"""Scores read their images as well."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """The choice to make: a recipe, with the keys that are open."""

    reference: str
    overrides: Sequence[str]
    draft: Draft
    seconds: float = 0.0
    """The time of the run."""
    threads: int | None = None
    """The number of threads, if one is chosen."""

    def recipe(self, size: Size, batch_size: int, epochs: float) -> Recipe:
        """The recipe with the keys of a size, where it leaves them open."""
        return read(self.reference, self.overrides, self.texts(size, batch_size, epochs))

    def texts(self, size: Size, batch_size: int, epochs: float) -> list[str]:
        """The chosen keys as overrides."""
        scored = f"{max(1, round(epochs / _SCORES))} epochs"
        chosen: dict[str, object] = {}
        if "model.name" in self.draft.open_keys:
            chosen |= {f"model.{key}": value for key, value in size.network.items()} | dict(size.settings)
        if "epochs" in self.draft.open_keys:
            chosen |= {"epochs": epochs, "checkpoints.every": scored}
            chosen |= {f"evaluators.{name}.every": scored for name in self.draft.evaluators}
            if size.warm_up:
                chosen["optim.schedule.warmup_epochs"] = round(size.warm_up * epochs, 2)
        if self.threads is not None:
            chosen["threads"] = self.threads
        values = {"data.image_size": size.image_size, "batch_size": batch_size}
        chosen |= {key: value for key, value in values.items() if key in self.draft.open_keys}
        return [f"{key}={json.dumps(value)}" for key, value in chosen.items()]


def choose(reference: str, overrides: Sequence[str], out: Path | None, teller: Teller) -> Recipe:
    """The recipe with a number for each key that says `auto`, and a network for `model.name=auto`.

    Those of the run in `out`, if it has begun; else what this machine trains in `limits.minutes`.

    Raises:
        ConfigError: as `read`; or the method has no sizes to choose from; so DataError of the images.
    """
    started = time.monotonic()
    draft = read_draft(reference, overrides)
    if not draft.open_keys:
        return read(reference, overrides)
    asked = _Asked(reference, overrides, draft)
    sizes = _sizes(draft)
    if out is not None and (out / "recipe.yaml").exists() and find_checkpoints(out / "checkpoints"):
        return read(reference, overrides, _taken_over(read(str(out / "recipe.yaml")), asked, sizes))
    device = choose_device(draft.device)
    minutes = _MINUTES[device.type] if draft.limits.minutes == "auto" else draft.limits.minutes
    asked = replace(asked, seconds=60 * minutes)
    images = open_images(asked.recipe(sizes[0], 1, 1.0), teller)
    batch_size = _batch_size(draft, images, device)
    teller.notice(
        f"auto: measuring what fits in {minutes:g} minutes ({', '.join(draft.open_keys)}; limits.minutes changes it)"
    )
    possible = _possible(sizes, images.train, draft)
    few = _few(images, 4 * batch_size)
    if _may_choose_threads(draft):
        asked, _ = _with_threads(asked, possible[0], batch_size, few, _PROBE)
    size = _largest(asked, possible, batch_size, few, len(images.train))
    asked, pace = _with_threads(asked, size, batch_size, images, _FINAL)
    recipe = asked.recipe(size, batch_size, 1.0)
    left = _MARGIN * 60 * minutes - (time.monotonic() - started) - pace.start_s
    epoch_s, score_s = plan_time(recipe, images.train, Silence()).total_steps * batch_size / pace.images_per_s, 0.0
    if images.val is not None and draft.evaluators:
        score_s = _ENCODED * len(images.val) / pace.encoded_per_s
    epochs = (
        draft.epochs
        if isinstance(draft.epochs, float | int)
        else _epochs(_bounds(draft, len(images.train)), epoch_s, score_s, left)
    )
    seconds = pace.start_s + epochs * epoch_s + min(_SCORES, epochs) * score_s
    machine = f"{num_cores()} cores" if device.type == "cpu" else str(device)
    used = "" if asked.threads is None else " with one thread"
    teller.notice(
        f"auto: {machine}, {minutes:g} minutes: {size}, batches of {batch_size}, {epochs:g} epochs at "
        f"{pace.images_per_s:,.0f} images/s{used}; about {duration(seconds)}{_offer(draft)}"
    )
    return asked.recipe(size, batch_size, epochs)


def _offer(draft: Draft) -> str:
    if draft.method.name != "supervised" or draft.model.weights is not None:
        return ""
    return "; from published weights it learns more in this time: opsin train folder-finetune"


def _sizes(draft: Draft) -> Sequence[Size]:
    known = SIZES.get(draft.method.name)
    if known is None:
        keys = ", ".join(f"{key}=auto" for key in draft.open_keys)
        raise ConfigError(
            f"{keys}: nothing to choose from for method.name={draft.method.name}; give values, or use a method of "
            f"{', '.join(SIZES)}"
        )
    if draft.stages and "epochs" not in draft.open_keys:
        return known
    if draft.stages:
        raise ConfigError("epochs=auto: cannot be chosen for a run with stages; give epochs, or leave the stages out")
    return known


def _taken_over(before: Recipe, asked: _Asked, sizes: Sequence[Size]) -> list[str]:
    """The chosen keys of a run that has begun."""
    known = flatten(before)
    possible = {text.partition("=")[0] for size in sizes for text in asked.texts(size, 1, 1.0)}
    if "model.name" in asked.draft.open_keys:
        possible |= {key for key in known if key.startswith("model.")}
    # A name first: it decides which keys its group has.
    keys = sorted((key for key in possible if key in known), key=lambda key: not key.endswith(".name"))
    return [f"{key}={json.dumps(known[key])}" for key in keys]


def _batch_size(draft: Draft, images: Images, device: torch.device) -> int:
    if isinstance(draft.batch_size, int):
        return draft.batch_size
    count = len(images.train)
    wished: int = 2 ** round(torch.tensor(max(count / _BATCHES_OF_AN_EPOCH, 1)).log2().item())
    most = 256 if device.type == "cpu" else 1024
    return min(max(min(wished, most), 32), count)


def _possible(sizes: Sequence[Size], source: Source, draft: Draft) -> list[Size]:
    """The sizes that do not enlarge the pictures; at least the first."""
    indices = torch.linspace(0, len(source) - 1, min(_SAMPLED, len(source))).long().tolist()
    sides = sorted(min(read_or_replace(source, index, draft.seed).image.shape[1:]) for index in indices)
    side = sides[len(sides) // 2]
    return [size for size in sizes if size.image_size <= side] or [sizes[0]]


def _may_choose_threads(draft: Draft) -> bool:
    return draft.threads == "auto" and choose_device(draft.device).type == "cpu" and choose_threads("auto") > 1


def _with_threads(
    asked: _Asked, size: Size, batch_size: int, images: Images, length: tuple[float, float]
) -> tuple[_Asked, Pace]:
    """Take one thread where it is as fast as all: for small networks beside other programs it is, and leaves a core."""
    share, most = length
    seconds = min(share * asked.seconds, most)
    asked = replace(asked, threads=None)
    pace = measure_pace(asked.recipe(size, batch_size, 1.0), seconds, images=images)
    if not _may_choose_threads(asked.draft):
        return asked, pace
    alone = replace(asked, threads=1)
    other = measure_pace(alone.recipe(size, batch_size, 1.0), seconds, images=images)
    if other.images_per_s >= pace.images_per_s:
        return alone, other
    return asked, pace


def _largest(asked: _Asked, sizes: Sequence[Size], batch_size: int, few: Images, count: int) -> Size:
    """The largest size whose fewest epochs of `count` images fit into the time; sizes are taken as ever slower.

    Each is measured on a `few` images.
    """
    if "model.name" not in asked.draft.open_keys and "data.image_size" not in asked.draft.open_keys:
        return sizes[0]
    given = asked.draft.epochs
    needed = (given if isinstance(given, float | int) else _bounds(asked.draft, count)[0]) * count / asked.seconds
    seconds = min(_PROBE[0] * asked.seconds, _PROBE[1])
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        recipe = asked.recipe(sizes[middle], batch_size, 1.0)
        alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 0})})
        try:
            fits = measure_pace(alone, seconds, images=few).images_per_s >= needed
        except (ConfigError, TrainingError):  # too large for the memory, or of a size that the network cannot take
            fits = False
        low, high = (middle, high) if fits else (low, middle - 1)
    return sizes[low]


def _few(images: Images, count: int) -> Images:
    indices = torch.linspace(0, len(images.train) - 1, min(count, len(images.train))).long()
    return Images(Subset(images.train.name, images.train, indices), images.val, images.facts)


def _bounds(draft: Draft, count: int) -> tuple[float, float]:
    """The fewest and the most epochs for this number of images."""
    low = min(max(_FEWEST_VIEWS / count, _FEWEST_EPOCHS[0]), _FEWEST_EPOCHS[1])
    high = min(max(_MOST_VIEWS / count, _MOST_EPOCHS[0]), _MOST_EPOCHS[1])
    share = 1.0 if draft.model.weights is None else _FROM_WEIGHTS
    return max(1.0, share * low), share * high


def _epochs(bounds: tuple[float, float], epoch_s: float, score_s: float, seconds: float) -> float:
    """The epochs that fit into `seconds` with their scores: at least one."""
    epochs = (seconds - min(_SCORES, seconds / epoch_s) * score_s) / epoch_s
    return float(max(1, min(int(epochs), round(bounds[1]))))
