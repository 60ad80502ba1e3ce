"""A run that fits into the memory it may hold: batches in parts, views in pieces, blocks computed twice.

These change how an update is computed, and not the update, except for the layers that draw (dropout, by part) and for
batch norm, which sees one part. So parts are not chosen for networks with batch norm unless
`memory.on_out_of_memory=always`. The choice becomes part of the recipe of the run, as numbers: a resume computes the
same parts, also on a larger machine.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from opsin.errors import ConfigError
from opsin.methods.base import Method
from opsin.processes.headroom import Room, find_rooms, held_bytes, own_limit
from opsin.run.forecast import MARGIN, MemoryForecast, forecast_memory, heaviest, rooms_of, workers_bytes
from opsin.run.parts import Parts
from opsin.run.recipe import Recipe, read
from opsin.settings.text import diff
from opsin.storage.teller import Teller
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.footprint import can_checkpoint
from opsin.training.memory import MemoryConfig, save_memory, uses_batch_statistics
from opsin.training.precision import hold_cushion, release_memory

_FEWEST = {"cpu": 8, "cuda": 32}
"""Images at a time below which other ways to save memory come first: smaller parts leave a device idle."""
_OVER = 4
"""A bound on the memory that is this many times below what is free needs no closer look."""
_CUSHIONED_BYTES = 2**30
"""Free memory below which none is set apart."""
_LOOK_BYTES = 2**29
"""A smaller bound needs no look either, which would take about as much itself."""
_MIB = 2**20


@contextmanager
def fitted(parts: Parts, teller: Teller, *, resuming: bool = False) -> Iterator[Parts]:
    """The parts as `fit_memory` returns them; inside, memory that ends is an error of this process, on a CPU.

    Raises:
        ConfigError: nothing makes the run fit.
    """
    if parts.recipe.memory.fit == "off":
        yield parts
        return
    parts = fit_memory(parts, teller, resuming=resuming)
    if parts.numerics.device.type != "cpu":
        yield parts
        return
    rooms = find_rooms()
    with own_limit(rooms, others=workers_bytes(parts)):
        if min((room.num_bytes for room in rooms), default=0) - held_bytes() > _CUSHIONED_BYTES:
            hold_cushion()
        yield parts
    release_memory(parts.numerics.device)


def fit_memory(parts: Parts, teller: Teller, *, resuming: bool = False) -> Parts:
    """Return the parts with a recipe whose `accumulate` and `memory.*` fit; the same ones if they do already.

    A run that goes on keeps what it has if that fits at all.

    Raises:
        ConfigError: nothing makes the run fit: a line for each part of the memory, and the way out.
    """
    if _is_small(parts):
        return parts
    asked = forecast_memory(parts)
    if asked.unknown:
        teller.notice(
            f"memory: not foreseen, since the method computes with the content of tensors ({asked.unknown}); if it "
            f"ends, memory.on_out_of_memory={parts.recipe.memory.on_out_of_memory} applies"
        )
        return parts
    if not asked.shortages(1.0 if resuming else MARGIN):
        return parts
    smallest = asked
    ways = list(_ways(parts))
    for way in ways[-1:] if asked.is_hopeless else ways:
        found, smallest = _fit(parts, way)
        if found is not None:
            break
    else:
        if asked.shortages(1.0):
            raise _does_not_fit(parts, asked, smallest)
        teller.notice(f"memory: {_need(asked)}, which is little; nothing saves some without changing the update")
        return parts
    fitting, forecast = found
    said = [line.replace(": ", "=", 1) for line in diff(parts.recipe, fitting)]
    teller.notice(
        f"memory: {_need(asked)}; chosen: {', '.join(said)}: {forecast.images} images at a time, "
        f"{_mib(forecast.need(_tightest(forecast).owner))} MiB; {_effect(parts, forecast)}"
    )
    save_memory(fitting.memory, parts.method)
    return replace(parts, recipe=fitting)


def keep_choices(recipe: Recipe, out: Path) -> Recipe:
    """Return the recipe with the choices of the run in `out`, if that is the same run but for them."""
    if recipe.memory.fit == "off" or not ((out / "recipe.yaml").exists() and find_checkpoints(out / "checkpoints")):
        return recipe
    before = read(str(out / "recipe.yaml"))
    chosen = {"view_chunk": before.memory.view_chunk, "checkpoint_blocks": before.memory.checkpoint_blocks}
    changed: dict[str, object] = {"accumulate": before.accumulate, "memory": recipe.memory.model_copy(update=chosen)}
    if not before.checkpoints.background:
        changed["checkpoints"] = recipe.checkpoints.model_copy(update={"background": False})
    kept = recipe.model_copy(update=changed)
    saves = before.accumulate % recipe.accumulate == 0 and kept.memory.saves_as_much_as(recipe.memory)
    return kept if saves and not diff(before, kept) else recipe


@dataclass(frozen=True, slots=True)
class _Way:
    """A way to save memory beside parts, and the fewest images at a time that it goes down to."""

    changes: Mapping[str, object]
    fewest: int
    background: bool = True

    def recipe(self, recipe: Recipe, accumulate: int) -> Recipe:
        changed: dict[str, object] = {
            "accumulate": accumulate,
            "memory": recipe.memory.model_copy(update=dict(self.changes)),
        }
        if not self.background:
            changed["checkpoints"] = recipe.checkpoints.model_copy(update={"background": False})
        return recipe.model_copy(update=changed)


def _ways(parts: Parts) -> Iterator[_Way]:
    """Ways to save memory, the one that costs the least time first."""
    memory, method = parts.recipe.memory, parts.method
    fewest = _FEWEST.get(parts.numerics.device.type, 1)
    pieces = _chunks(memory, method)
    ways: list[dict[str, object]] = [{}]
    ways += [{"view_chunk": pieces[0]}] if pieces else []
    if not memory.checkpoint_blocks and can_checkpoint(method):
        ways += [{**way, "checkpoint_blocks": True} for way in ways]
    ways += [{**ways[-1], "view_chunk": views} for views in pieces[1:]]
    for way in ways:
        yield _Way(way, fewest)
    yield _Way(ways[-1], 1)
    if parts.recipe.checkpoints.background:
        yield _Way(ways[-1], 1, background=False)


def _chunks(memory: MemoryConfig, method: Method) -> list[int]:
    """Numbers of views at a time that save memory and do not change the update."""
    if type(method).chunks is Method.chunks or uses_batch_statistics(method):
        return []
    return [views for views in (2, 1) if memory.view_chunk is None or views < memory.view_chunk]


def _fit(parts: Parts, way: _Way) -> tuple[tuple[Recipe, MemoryForecast] | None, MemoryForecast]:
    """The recipe with the fewest parts that fits on this way, with its forecast; and the smallest forecast there is."""
    counts = _counts(parts, way.fewest)

    def look(accumulate: int) -> MemoryForecast:
        return forecast_memory(replace(parts, recipe=way.recipe(parts.recipe, accumulate)))

    smallest = look(counts[-1])
    if smallest.shortages():
        return None, smallest
    for accumulate in counts[:-1]:
        # All that grows with the images is taken to do so in proportion; a look costs a second.
        grown = int(smallest.divisible * (counts[-1] / accumulate - 1))
        if not smallest.shortages(grown=grown) and not (found := look(accumulate)).shortages():
            return (way.recipe(parts.recipe, accumulate), found), smallest
    return (way.recipe(parts.recipe, counts[-1]), smallest), smallest


def _counts(parts: Parts, fewest: int) -> list[int]:
    """Numbers of parts to try: as asked, and doubled as long as `fewest` images are in each."""
    asked, images = parts.recipe.accumulate, heaviest(parts).batch_size
    if not _may_split(parts):
        return [asked]
    smallest = min(stage.batch_size for stage in parts.timeline.stages)
    most = min(images // fewest, smallest)
    doubled = [asked << power for power in range(max(1, math.ceil(math.log2(max(2, images)))) + 1)]
    return [asked, *(count for count in doubled[1:] if count <= most)]


def _may_split(parts: Parts) -> bool:
    return parts.recipe.memory.on_out_of_memory == "always" or not uses_batch_statistics(parts.method)


def _effect(parts: Parts, forecast: MemoryForecast) -> str:
    if uses_batch_statistics(parts.method):
        return f"batch norm sees {forecast.images} images instead of the batch (memory.on_out_of_memory=always)"
    return "the update stays the same"


def _does_not_fit(parts: Parts, asked: MemoryForecast, smallest: MemoryForecast) -> ConfigError:
    keeps = "" if _may_split(parts) else ", memory.on_out_of_memory=always (batch norm then sees smaller parts)"
    least = _tightest(smallest)
    return ConfigError(
        f"memory: {_need(asked)}, and {_mib(smallest.need(least.owner))} MiB with {smallest.images} images at a time "
        "and all that saves memory:",
        *(f"    {line}" for line in smallest.table()),
        f"use a smaller model, image size or batch_size{keeps}, fewer data.workers, data.resident=false, or a larger "
        "machine; memory.fit=off tries it as it is",
    )


def _need(forecast: MemoryForecast) -> str:
    room = _tightest(forecast)
    return f"{_mib(forecast.need(room.owner))} MiB foreseen, {_mib(room.num_bytes)} MiB may be held ({room.limit})"


def _tightest(forecast: MemoryForecast) -> Room:
    return min(forecast.rooms, key=lambda room: room.num_bytes / max(1, forecast.need(room.owner)))


def _is_small(parts: Parts) -> bool:
    """True if a rough bound on the memory is far below what is free, so that a forecast would be a waste of time.

    What layers hold for a pixel is bounded by their weights, and by the square of the pixels for attention.
    """
    stage, method = heaviest(parts), parts.method
    weights = sum(tensor.nbytes for tensor in (*method.parameters(), *method.buffers()))
    sides = [(crop.count, crop.size**2) for crop in method.views(stage.image_size).crops.values()]
    pixels, pairs = sum(n * p for n, p in sides), sum(n * p * p for n, p in sides)
    bound = 10 * weights + stage.batch_size * (weights * pixels // 16 + 64 * pairs + 64 * pixels)
    # Of a GPU a process holds little before the first step.
    free = [room.num_bytes - (0 if room.owner == "gpu" else held_bytes()) for room in rooms_of(parts)]
    return bound < _LOOK_BYTES or not free or _OVER * bound < min(free)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f}"
