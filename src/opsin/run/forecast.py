"""The memory of a run, part by part, before its first step, against what the system lets it have.

    forecast = forecast_memory(build_parts(recipe, teller))
    print("\\n".join(forecast.table()))
    if forecast.shortages(): ...

It takes about a second and changes nothing. Another `accumulate`, `memory.view_chunk` or `memory.checkpoint_blocks` is
tried with `forecast_memory(replace(parts, recipe=...))`. `run/fit.py` chooses these so that a run fits.
"""

import math
from dataclasses import dataclass, replace

import torch

from opsin.clock.timeline import Stage
from opsin.data.base import Source
from opsin.data.quarantine import read_or_replace
from opsin.data.resident import byte_limit
from opsin.data.shared_memory import available_bytes, bytes_in_flight, fit
from opsin.evaluation.features import FeatureScoreConfig
from opsin.evaluation.maps import MapsConfig
from opsin.processes.headroom import Owner, Room, find_rooms, held_bytes
from opsin.run.images import num_workers
from opsin.run.parts import Parts
from opsin.storage.table import aligned
from opsin.training import precision
from opsin.training.footprint import Footprint, UpdateTrial
from opsin.training.optim import schedule_setter
from opsin.training.state import StepPlan

MARGIN = 1.1
"""A forecast must fit this many times: it is within 15 % of what is measured, mostly above."""
_MIB = 2**20
_GAPS = 0.3
"""Share of an update that gaps between blocks take beside it, with freed memory kept (glibc): 0.2 to 0.5 measured."""
_FIRST_USE = 60 * _MIB
"""Code and kernels that are loaded when they are first used (30 to 80 measured)."""
_DRAWING = 100 * _MIB
"""Memory of an evaluator that draws: matplotlib and the pictures (measured)."""
_GPU_SCRATCH = 64 * _MIB
"""Workspaces of cuBLAS and cuDNN."""
_FORK_SERVER, _WORKER = 300 * _MIB, 100 * _MIB
"""Memory of the process that workers come from, and of each of them with the photographs that it cuts (measured)."""
_EVALUATED = 256
"""Images of a forward pass where an evaluator does not say how many."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """A part of the memory of a run."""

    name: str
    num_bytes: int
    owner: Owner
    """`machine` for what other processes of the run hold."""


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """The parts of the memory at the worst moment of a run, and what may be held."""

    parts: tuple[MemoryPart, ...]
    moment: str
    """The worst moment: `update`, `loading` or `evaluation`."""
    images: int
    """Images that are computed at a time."""
    divisible: int
    """Bytes that fewer images at a time save, all of them together."""
    rooms: tuple[Room, ...]
    state_bytes: int
    """Bytes of what a checkpoint holds: weights, averages, moments."""
    unknown: str = ""
    """The reason for which the update could not be foreseen; its parts are missing then."""

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the training process; on a GPU, of its tensors there. `summary.json` has what was measured."""
        return self.need("gpu") or self.need("process")

    def need(self, owner: Owner) -> int:
        """Bytes that count for a room of `owner`: workers count for the machine alone."""
        counted = {"gpu": ("gpu",), "process": ("process",), "machine": ("process", "machine")}[owner]
        return sum(part.num_bytes for part in self.parts if part.owner in counted)

    def shortages(self, margin: float = MARGIN, *, grown: int = 0) -> list[Room]:
        """The rooms that are too small, the smallest share first; empty if the run fits.

        `grown` is the number of bytes by which an update is taken to be larger than foreseen.
        """
        owners = ("gpu",) if self.need("gpu") else ("process", "machine")
        more = {room: grown if room.owner in owners else 0 for room in self.rooms}
        short = [room for room in self.rooms if (self.need(room.owner) + more[room]) * margin > room.num_bytes]
        return sorted(short, key=lambda room: room.num_bytes / self.need(room.owner))

    @property
    def is_hopeless(self) -> bool:
        """True if not even single images would fit, with all that can be saved."""
        return bool(self.shortages(1.0, grown=-self.divisible))

    def table(self) -> list[str]:
        """A line for each part, the sum, and a line for each limit."""
        where = {"gpu": "GPU", "process": "this process", "machine": "other processes"}
        rows = [(part.name, _mib(part.num_bytes), where[part.owner]) for part in self.parts if part.num_bytes]
        owners: list[Owner] = ["gpu", "machine"] if self.need("gpu") else ["machine"]
        rows += [("in all", _mib(self.need(owner)), "GPU" if owner == "gpu" else "this machine") for owner in owners]
        rows += [(room.limit, _mib(room.num_bytes), f"for {_FOR[room.owner]}") for room in self.rooms]
        return aligned([("memory at the worst moment", "MiB", f"({self.moment})"), *rows], left=1)


_FOR = {"gpu": "the GPU", "process": "this process", "machine": "all processes"}


def forecast_memory(parts: Parts) -> MemoryForecast:
    """Return the memory that a run of `parts` will need. It trains nothing, and leaves `parts` as it is.

    Anything that a method of one's own does with the content of tensors on the host may make its update unknown: see
    `MemoryForecast.unknown`.
    """
    recipe, stage = parts.recipe, heaviest(parts)
    images = -(-stage.batch_size // recipe.accumulate)
    unknown = ""
    try:
        found, encoding = _trace(parts, stage, images)
    except Exception as error:  # of any kind: the method may be anybody's
        unknown = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        found, encoding = Footprint(*[0] * 8), 0
    return replace(_add_up(parts, stage, found, encoding), images=images, unknown=unknown)


def heaviest(parts: Parts) -> Stage:
    """Return the stage whose batches have the most pixels."""
    return max(parts.timeline.stages, key=lambda stage: stage.batch_size * stage.image_size**2)


def _trace(parts: Parts, stage: Stage, images: int) -> tuple[Footprint, int]:
    """The footprint of an update, and the bytes of a forward pass of the evaluators."""
    recipe, numerics, timeline = parts.recipe, parts.numerics, parts.timeline
    # The last step of the stage: by then all layers learn that will.
    step = sum(one.steps for one in timeline.stages[: timeline.stages.index(stage) + 1]) - 1
    views = parts.method.views(stage.image_size)
    masks = {} if views.masks is None else views.masks(recipe.seed, 0, torch.arange(images))
    plan = StepPlan(
        forward=parts.method,
        clock=timeline.clock,
        set_schedule=schedule_setter(recipe.optim, parts.method),
        autocast=precision.autocast(numerics.device, numerics.precision),
        seed=recipe.seed,
        accumulate=recipe.accumulate,
        view_chunk=recipe.memory.view_chunk,
        clip_norm=recipe.optim.clip_norm,
        clip_each=recipe.optim.clip == "each",
    )
    trial = UpdateTrial(
        parts.method,
        recipe.optim,
        plan,
        averages=recipe.ema is not None,
        scales_loss=numerics.precision == "fp16",
        checkpoint_blocks=recipe.memory.checkpoint_blocks,
    )
    found = trial.run(views, masks, images=images, step=step)
    sizes = [getattr(wanted, "batch_size", _EVALUATED) for wanted in recipe.evaluators.values()]
    encoding = trial.encode(recipe.data.image_size, images=max(sizes)) if sizes else 0
    return found, encoding


def _add_up(parts: Parts, stage: Stage, found: Footprint, encoding: int) -> MemoryForecast:
    """The parts at the worst moment; `encoding` is the forward pass of an evaluator."""
    recipe = parts.recipe
    on_gpu = parts.numerics.device.type != "cpu"
    device: Owner = "gpu" if on_gpu else "process"
    gaps = 0.0 if on_gpu else _GAPS
    weights = sum(tensor.nbytes for tensor in (*parts.method.parameters(), *parts.method.buffers()))
    state = found.state if found.state else weights

    resident = _trains_resident(parts)

    def of(name: str, num_bytes: float, owner: Owner = device) -> MemoryPart:
        return MemoryPart(name, int(num_bytes), owner)

    images = of("images kept in memory", resident + _evaluated_bytes(parts))
    always = [
        of("weights that learn", found.weights),
        of("other weights (teacher) and buffers", found.others or (0 if found.weights else weights)),
        of("averaged weights", found.averaged),
        of("moments of the optimizer", found.moments),
        images,
    ]
    floats, stored = _batch_bytes(parts, stage)
    moments = {
        "update": [
            of("gradients", found.gradients),
            of("forward and backward pass", found.activations),
            of("forward pass of the teacher", found.teacher),
            of("scores and loss", found.loss),
            of("gaps between blocks", gaps * found.transient),
            of("batch", floats),
        ],
        "loading": [of("batch", floats), of("the same as it was stored", stored)],
        "evaluation": [
            of("evaluation: features", _feature_bytes(parts)),
            of("evaluation: forward pass", (1 + gaps) * encoding),
        ],
    }
    draws = any(isinstance(wanted, MapsConfig) for wanted in recipe.evaluators.values())
    moment = max(moments, key=lambda name: sum(part.num_bytes for part in moments[name]))
    process = held_bytes() - (0 if on_gpu else weights)
    host = [
        of("program and libraries", process + _FIRST_USE + (_DRAWING if draws else 0), "process"),
        of("copy of the state for checkpoints", state if recipe.checkpoints.background or on_gpu else 0, "process"),
        of("kernels", _GPU_SCRATCH if on_gpu else 0),
        *([] if resident else _workers(parts, stored)),
    ]
    divisible = int((1 + gaps) * (found.transient - found.gradients)) if moment == "update" else 0
    kept = sum(part.num_bytes for part in always if part is not images)
    return MemoryForecast((*always, *moments[moment], *host), moment, 0, divisible, tuple(rooms_of(parts)), kept)


def _batch_bytes(parts: Parts, stage: Stage) -> tuple[int, int]:
    """The bytes of a whole batch as floats, and as it is stored (uint8)."""
    crops = parts.method.views(stage.image_size).crops.values()
    values = sum(crop.count * 3 * crop.size**2 for crop in crops) * stage.batch_size
    return 4 * values, values


def stored_bytes(parts: Parts) -> int:
    """The bytes of the largest batch on its way from the workers; 0 if the images stay in memory."""
    return 0 if _trains_resident(parts) else _batch_bytes(parts, heaviest(parts))[1]


def _trains_resident(parts: Parts) -> int:
    """The bytes of the training images if they will stay decoded, else 0. Of their sizes only three are looked at."""
    wanted, source = parts.recipe.data.resident, parts.images.train
    if wanted is False:
        return 0
    some = [read_or_replace(source, index, parts.recipe.seed).image for index in {0, len(source) // 2, len(source) - 1}]
    size = len(source) * some[0].nbytes
    is_small = size <= byte_limit(parts.numerics.device) and len({image.shape for image in some}) == 1
    return size if wanted is True or is_small else 0


def _evaluated_bytes(parts: Parts) -> int:
    """The bytes of the images that evaluators keep decoded."""
    recipe = parts.recipe
    if recipe.data.resident is False:
        return 0
    counts: set[int] = set()
    for wanted in recipe.evaluators.values():
        counts |= set(
            _labelled(parts, wanted) if isinstance(wanted, FeatureScoreConfig) else [_count(parts.images.val)]
        )
    sizes = [count * 3 * recipe.data.image_size**2 for count in counts]
    limit = math.inf if recipe.data.resident is True else byte_limit(parts.numerics.device)
    return sum(size for size in sizes if size <= limit)


def _labelled(parts: Parts, wanted: FeatureScoreConfig) -> tuple[int, int]:
    """Images that a score of features learns from, and that it scores; those of the run where it has its own."""
    bank, queries = _count(parts.images.train) - parts.images.facts.unlabelled, _count(parts.images.val)
    return min(bank, wanted.bank_images or bank), min(queries, wanted.query_images or queries)


def _count(source: Source | None) -> int:
    return 0 if source is None else len(source)


def _feature_bytes(parts: Parts) -> int:
    """The bytes of the features of the largest score."""
    scores = [wanted for wanted in parts.recipe.evaluators.values() if isinstance(wanted, FeatureScoreConfig)]
    values = (sum(_labelled(parts, score)) * score.blocks for score in scores)
    once = 4 * parts.method.backbone.width * max(values, default=0)
    return once + min(once, 2**28)  # the linear probe copies small sets


def _workers(parts: Parts, stored: int) -> list[MemoryPart]:
    """The processes that read images, and their finished batches of `stored` bytes."""
    fitted = fit(num_workers(parts.recipe), parts.recipe.data.prefetch, stored, available_bytes())
    count = fitted.workers
    if count == 0:
        return []
    return [
        MemoryPart(f"{count} data workers", _FORK_SERVER + count * _WORKER, "machine"),
        MemoryPart("their finished batches", bytes_in_flight(count, fitted.prefetch, stored), "machine"),
    ]


def workers_bytes(parts: Parts) -> int:
    """The memory that other processes of a run will hold."""
    stored = _batch_bytes(parts, heaviest(parts))[1]
    return 0 if _trains_resident(parts) else sum(part.num_bytes for part in _workers(parts, stored))


def rooms_of(parts: Parts) -> list[Room]:
    """The memory that a run of `parts` may hold, by each limit; empty if the system does not say."""
    device = parts.numerics.device
    free = precision.gpu_room(device)
    return find_rooms() if free is None else [*find_rooms(), Room(f"memory of {device}", free, "gpu")]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.0f}"
