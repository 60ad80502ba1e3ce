"""Checks of the learning: some updates on one small batch, and what they must and must not change.

Nothing of it is kept. The batch is small so that any network is checked within seconds; all else is that of the recipe.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opsin.clock.schedule import Constant
from opsin.data.base import Batch
from opsin.run.assemble import temporary_run
from opsin.run.checks.verdict import Verdict
from opsin.run.images import Images
from opsin.run.pace import silent_console, small_stage, stream
from opsin.run.recipe import Recipe
from opsin.training.checkpoints.format import read_checkpoint
from opsin.training.checkpoints.snapshot import take_snapshot
from opsin.training.checkpoints.writer import write_checkpoint
from opsin.training.loop import Run
from opsin.training.state import TrainState
from opsin.training.step import train_step

_Weights = Mapping[str, Tensor]

_IMAGES, _STEPS, _ENOUGH = 16, 20, 8
_SECONDS = 20.0
_FALL = 0.02
"""Share of the first loss by which the last ones must be lower."""
_FOLLOWED = 1e-5
"""Share of the way of the weights that a teacher or an average goes at least."""
_LOWER = 0.1
"""Factor on the learning rate for a second try: without its warm-up, the rate of a recipe may be too high at first."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """Updates on one batch."""

    losses: Sequence[float]
    factor: float
    seconds: float
    verdicts: Sequence[Verdict]
    """On what is beside the loss."""

    @property
    def steps(self) -> int:
        """Updates before the last loss."""
        return len(self.losses) - 1

    @property
    def fall(self) -> float:
        """Share of the first loss that is gone in the end; NaN if a loss is not finite."""
        last = self.losses[-3:]
        return (self.losses[0] - sum(last) / len(last)) / abs(self.losses[0] or 1.0)


def check_learning(recipe: Recipe, images: Images, disk: Path) -> Iterator[Verdict]:
    """Train on one batch; compare teacher, averages, and a checkpoint that is written into the folder `disk`.

    Raises:
        ConfigError: as `assemble`; so DataError.
    """
    trial = _try(recipe, images, 1.0, disk)
    if not trial.fall >= _FALL and trial.steps >= _ENOUGH:
        trial = _try(recipe, images, _LOWER, disk)
    yield _verdict(recipe, trial)
    yield from trial.verdicts


def _verdict(recipe: Recipe, trial: _Trial) -> Verdict:
    rate, first, last = recipe.optim.lr, trial.losses[0], trial.losses[-1]
    text = f"loss {first:.3g} -> {last:.3g} in {trial.steps} updates of one batch ({trial.seconds:.0f} s)"
    if not trial.fall >= _FALL and math.isfinite(last) and trial.steps < _ENOUGH:
        return Verdict("learns", "look", f"{text}: too few to tell; this network is slow on this machine")
    if not trial.fall >= _FALL:
        way_out = f"optim.lr={rate} may be far off: opsin tune lr finds one; or no layer learns (stages, train)"
        return Verdict("learns", "fault", f"{text}: a network that learns anything learns one batch; {way_out}")
    if trial.factor < 1:
        tenth = f"only with {trial.factor:g} of optim.lr={rate}; it needs its warm-up"
        return Verdict("learns", "look", f"{text}, {tenth} (optim.schedule.warmup_epochs), or a lower rate")
    return Verdict("learns", "fine", text)


def _try(recipe: Recipe, images: Images, factor: float, disk: Path) -> _Trial:
    with temporary_run(_small(recipe, images, factor), silent_console(), images) as run:
        state = run.start.fresh()
        with closing(stream(run)) as batches:
            batch = next(batches)
        verdicts = [*_twins(state)]
        followers = {"teacher": ("method.momentum", _teacher(state))}
        if state.ema is not None:
            followers["averages"] = ("ema.decay", state.ema.average)
        before = {name: _copies(weights) for name, (_, weights) in followers.items()}
        trained = dict(state.method.trained_backbone.named_parameters())
        begun = _copies(trained)
        started = time.monotonic()
        losses = _losses(run, state, batch, started)
        seconds = time.monotonic() - started
        if all(map(math.isfinite, losses)):
            way = _way(trained, begun)
            for name, (key, weights) in followers.items():
                if weights and way > 0:
                    verdicts.append(_follower(name, key, _way(weights, before[name]), way))
            verdicts.append(_round_trip(state, disk))
        return _Trial(losses, factor, seconds, verdicts)


def _small(recipe: Recipe, images: Images, factor: float) -> Recipe:
    """The recipe for a small batch, at its peak rate and in this process."""
    optim, small = recipe.optim, small_stage(recipe, min(_IMAGES, len(images.train)))
    lr = 1e-3 if optim.lr == "auto" else optim.peak_lr(recipe.batch_size)
    others = {key: value for key, value in optim if key.endswith("_lr") and isinstance(value, float)}
    scale = optim.batch_scale(recipe.batch_size)
    rates = {"lr": factor * lr, **{key: factor * scale * value for key, value in others.items()}}
    changes = {
        "optim": optim.model_copy(update={**rates, "lr_batch_size": None, "schedule": Constant()}),
        "data": small.data.model_copy(update={"workers": 0, "resident": False}),
    }
    return small.model_copy(update=changes)


def _losses(run: Run, state: TrainState, batch: Batch, started: float) -> list[float]:
    """The losses of updates; the batch is made smaller if an update takes too long, before any counts."""
    losses: list[float] = []
    while len(losses) <= _STEPS:
        began = time.monotonic()
        report = train_step(state, batch, run.plan)
        losses.append(float(report.values["train/loss"]))
        took = time.monotonic() - began
        if len(losses) > 3 and time.monotonic() - started + took > _SECONDS:
            break
        if not math.isfinite(losses[-1]):
            break
        if len(losses) == 1 and took > _SECONDS / _STEPS and len(batch) > 2:
            losses, batch = [], batch.pieces(2)[0]
    return losses


def _teacher(state: TrainState) -> _Weights:
    """The weights that follow others; none if the method has no such."""
    method = state.method
    return {} if method.backbone is method.trained_backbone else dict(method.backbone.named_parameters())


def _copies(weights: _Weights) -> _Weights:
    return {name: value.detach().clone() for name, value in weights.items()}


def _way(now: _Weights, before: _Weights) -> float:
    """The largest change of any weight."""
    return max((float((value.detach() - before[name]).abs().max()) for name, value in now.items()), default=0.0)


def _twins(state: TrainState) -> Iterator[Verdict]:
    """Compare the teacher with the student, whose copy it begins as."""
    method = state.method
    if method.backbone is method.trained_backbone:
        return
    student = dict(method.trained_backbone.named_parameters())
    other = [name for name, param in method.backbone.named_parameters() if not torch.equal(param, student[name])]
    if other:
        text = f"{len(other)} tensors differ from the student's at the start ({other[0]}): a method must copy them"
        yield Verdict("teacher", "fault", text)


def _follower(name: str, key: str, way: float, trained: float) -> Verdict:
    """Check that weights which follow others have gone a part of their way."""
    if way < _FOLLOWED * trained:
        return Verdict(name, "fault", f"stands still: {key} is so near 1 that updates do not count; lower it")
    return Verdict(name, "fine", "follows the weights that learn")


def _round_trip(state: TrainState, disk: Path) -> Verdict:
    """Write a checkpoint to `disk`, read it, and compare."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".opsin-check-", dir=disk) as folder:
        path = write_checkpoint(Path(folder), take_snapshot(state, None), {"recipe": ""}, level=None)
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
        stored = read_checkpoint(path)
    text = f"{num_bytes / 2**20:,.1f} MiB, written and read in {time.monotonic() - started:.1f} s"
    weights = state.method.state_dict()
    if any(not torch.equal(value, weights[name].cpu()) for name, value in stored.method.items()):
        return Verdict("checkpoint", "fault", f"{text}, with other weights than were written: do not trust {disk}")
    return Verdict("checkpoint", "fine", f"{text}, equal")
