"""The factors of `opsin tune all`: keys that change the speed of a recipe, with the values to try."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from opsin.methods.base import Method
from opsin.processes.cores import num_cores
from opsin.run.images import num_workers
from opsin.run.parts import Parts
from opsin.run.threads import choose_threads
from opsin.training.memory import uses_batch_statistics
from opsin.tuning.loader import why_not_resident

_FORMATS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}
_MOST_WORKERS = 32
_BATCH_NORM = "batch norm"


@dataclass(frozen=True, slots=True)
class Factor:
    """Keys that are tried together, and what they change in what is learned beyond rounding; empty for nothing."""

    name: str
    values: tuple[Mapping[str, object], ...]
    changes: str = ""


def list_factors(parts: Parts) -> list[Factor]:
    """The factors of a recipe that can make a difference on this machine, each without the value it has."""
    recipe = parts.recipe
    found = [
        Factor("precision", tuple(_precision(parts)), "the number format"),
        Factor("threads", tuple(_threads(parts))),
        Factor("loader", tuple(_loader(parts))),
        Factor("batch", tuple(_accumulate(parts)), _of_batch_norm(parts)),
        Factor("view_chunk", tuple(_view_chunk(parts)), _of_batch_norm(parts)),
        Factor("checkpointing", ({"memory.checkpoint_blocks": not recipe.memory.checkpoint_blocks},)),
        Factor("channels_last", tuple(_channels_last(parts))),
        # It takes longest to begin: the last one may use all the time that is left.
        Factor("compile", ({"compile": not recipe.compile},)),
    ]
    return [factor for factor in found if factor.values]


def _precision(parts: Parts) -> Iterator[Mapping[str, object]]:
    formats = _FORMATS.get(parts.numerics.device.type, ())
    yield from ({"precision": one} for one in formats if one != parts.numerics.precision)


def _channels_last(parts: Parts) -> Iterator[Mapping[str, object]]:
    if sum(isinstance(module, nn.Conv2d) for module in parts.method.modules()) > 1:
        yield {"channels_last": not parts.numerics.channels_last}


def _threads(parts: Parts) -> Iterator[Mapping[str, object]]:
    if parts.numerics.device.type == "cpu":
        cores, now = num_cores(), choose_threads(parts.recipe.threads)
        yield from ({"threads": number} for number in sorted({1, cores // 2, cores} - {0, now}))


def _accumulate(parts: Parts) -> Iterator[Mapping[str, object]]:
    now, smallest = parts.recipe.accumulate, min(stage.batch_size for stage in parts.timeline.stages)
    numbers = sorted({1, now // 2, 2 * now, 4 * now} - {0, now})
    yield from ({"accumulate": number} for number in numbers if number <= smallest)


def _view_chunk(parts: Parts) -> Iterator[Mapping[str, object]]:
    if type(parts.method).chunks is not Method.chunks:
        now = parts.recipe.memory.view_chunk
        yield from ({"memory.view_chunk": views} for views in (None, 1, 2, 4) if views != now)


def _of_batch_norm(parts: Parts) -> str:
    return _BATCH_NORM if uses_batch_statistics(parts.method) else ""


def _loader(parts: Parts) -> Iterator[Mapping[str, object]]:
    recipe, device = parts.recipe, parts.numerics.device
    fits = not why_not_resident(parts.images.train, recipe.seed, device)
    is_resident = recipe.data.resident is True or (recipe.data.resident == "auto" and fits)
    if fits and not is_resident:
        yield {"data.resident": True}
    counts = [0, *(2**power for power in range(6) if 2**power <= min(num_cores(), _MOST_WORKERS))]
    for workers in counts:
        if is_resident:
            yield {"data.resident": False, "data.workers": workers}
        elif workers != num_workers(recipe):
            yield {"data.workers": workers}
    if not is_resident and num_workers(recipe):
        yield {"data.prefetch": 2 if recipe.data.prefetch != 2 else 4}
