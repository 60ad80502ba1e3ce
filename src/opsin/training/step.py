"""One optimizer update: the only code that changes weights.

The update is a transaction. Loss and gradient norm are tested on the device; if one is not finite, weights, moments,
buffers and the averages of the method stay as they were, and only the step counter moves. The host never waits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opsin.clock.seeding import seed_layers
from opsin.clock.timeline import Clock
from opsin.data.base import Batch
from opsin.errors import is_out_of_memory
from opsin.methods.base import Losses
from opsin.processes.world import least_over_processes
from opsin.training.buffers import KeptBuffers
from opsin.training.gradients import scale
from opsin.training.precision import release_memory
from opsin.training.state import ScheduledValues, StepPlan, StepReport, TrainState
from opsin.training.stopwatch import Stopwatch, span


def train_step(state: TrainState, batch: Batch, plan: StepPlan) -> StepReport:
    """Update the weights once with the images of `batch`.

    The gradient is the mean over the whole batch, whatever the number of its parts. Batch statistics (batch norm) are
    those of one part; everything else is equal to the undivided batch. If memory runs out and the plan allows it, the
    update is repeated in smaller parts.
    """
    before = plan.fallback.found
    while True:
        parts = plan.accumulate * plan.fallback.factor(state.step)
        try:
            return _update(state, batch, plan, parts)
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) and state.whole):
                raise
            if not plan.fallback.double(state.step, parts=parts, images=len(batch)):
                plan.fallback.take_back(before, state.step)
                raise
        # Here and not above: with the error go the frames that it holds, and with these the tensors in them.
        release_memory(batch.ids.device)


def _update(state: TrainState, batch: Batch, plan: StepPlan, parts: int) -> StepReport:
    clock = plan.clock(state.step)
    scheduled = _set_schedule(state, clock, plan)
    plan.set_layers(clock)
    times = Stopwatch(batch.ids.device)
    buffers = KeptBuffers(list(state.method.buffers()))
    try:
        values, features = _accumulate(state, batch.pieces(parts), clock, plan, times)
        with span("optimizer"):
            norm, applied = _settle_gradients(state, values["train/loss"], plan)
            plan.show_gradients(state.method, state.step + 1)
    except BaseException:
        buffers.restore()
        state.optimizer.zero_grad()
        raise
    with span("optimizer"):
        state.whole = False
        state.method.before_update(clock)
        state.optimizer.found_inf = 1 - applied  # type: ignore[attr-defined]  # read by the fused kernels
        state.optimizer.step()
        state.optimizer.zero_grad()
        buffers.restore_unless(applied)
        state.method.after_update(clock, applied)
        if state.ema is not None:
            state.ema.update(plan.ema_decay(state.step), applied)
        if state.loss_scale is not None:
            state.loss_scale.update(applied)
    state.step += 1
    state.whole = True
    values["train/grad_norm"] = norm
    times.lap("optimizer")
    return StepReport(state.step, clock, scheduled, values, applied, batch.ids, len(batch), times, features)


def _set_schedule(state: TrainState, clock: Clock, plan: StepPlan) -> ScheduledValues:
    """Set the scheduled values; after a rollback the learning rates are lower for a while."""
    scheduled = plan.set_schedule(state.optimizer, clock)
    factor = state.lr_factor
    if factor == 1:
        return scheduled
    for group in state.optimizer.param_groups:
        group["lr"] *= factor
    return replace(scheduled, lr=scheduled.lr * factor)


def _accumulate(
    state: TrainState, parts: Sequence[Batch], clock: Clock, plan: StepPlan, times: Stopwatch
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """Add the gradients of the mean loss to the parameters; return the mean values, and features."""
    total: dict[str, Tensor] = {}
    features: Mapping[str, Tensor] = {}
    images = sum(map(len, parts))
    for index, part in enumerate(parts):
        seed_layers(plan.seed, state.step, plan.rank, index)
        weight = len(part) / images
        for losses in _forward(state, part, clock, plan):
            times.lap("forward")
            loss = losses.total * weight
            with span("backward"):
                (loss if state.loss_scale is None else loss * state.loss_scale.scale).backward()
            times.lap("backward")
            for name, value in _named(losses).items():
                share = value.detach().float() * weight
                total[name] = total[name] + share if name in total else share
            features = losses.features or features
    return total, features


def _forward(state: TrainState, part: Batch, clock: Clock, plan: StepPlan) -> Iterator[Losses]:
    """The losses of a part, in the pieces of the plan."""
    pieces = iter([part]) if plan.view_chunk is None else state.method.chunks(part, clock, plan.view_chunk)
    while True:
        with span("forward"), plan.autocast():
            piece = next(pieces, None)
            losses = None if piece is None else plan.forward(piece, clock)
        if losses is None:
            return
        yield losses


def _named(losses: Losses) -> Mapping[str, Tensor]:
    return {
        "train/loss": losses.total,
        **{f"loss/{name}": value for name, value in losses.parts.items()},
        **{f"train/{name}": value for name, value in losses.measures.items()},
    }


@torch.no_grad()
def _settle_gradients(state: TrainState, loss: Tensor, plan: StepPlan) -> tuple[Tensor, Tensor]:
    """Unscale and clip in one pass over the gradients; the norm before the clip, and 1 if all is finite."""
    grads = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    norm = torch.linalg.vector_norm(norms)
    factor: Tensor | None = None
    if state.loss_scale is not None:
        factor = 1 / state.loss_scale.scale
        norm = norm * factor
    if plan.clip_norm is not None:
        own = norm if not plan.clip_each else norms if factor is None else norms * factor
        shrink = (plan.clip_norm / (own + 1e-6)).clamp(max=1.0)
        factor = shrink if factor is None else factor * shrink
    if factor is not None:
        scale(grads, factor)
    # Each process has a loss of its own: what one of them cancels, no other may apply.
    return norm, least_over_processes((torch.isfinite(loss) & torch.isfinite(norm)).float())
