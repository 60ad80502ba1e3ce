"""One optimizer update: the only code that changes weights.

The update is a transaction. Loss and gradient norm are tested on the device; where either is not
finite, weights, moments, buffers and whatever the method updates stay as they were, and only the
step counter moves. The host never waits for the answer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opsin.data.base import Batch
from opsin.methods.base import Losses
from opsin.seeding import seed_layers
from opsin.timeline import Clock
from opsin.training.state import StepPlan, StepReport, TrainState
from opsin.training.stopwatch import Stopwatch


def train_step(state: TrainState, batch: Batch, plan: StepPlan) -> StepReport:
    """Update the weights once with the images of `batch`.

    The gradient is the mean over the whole batch, in however many parts it is computed. Batch
    statistics (batch norm) see one part at a time; everything else is equal to the undivided batch.
    """
    clock = plan.clock(state.step)
    pace = plan.set_pace(state.optimizer, clock)
    plan.set_layers(clock)
    times = Stopwatch(batch.ids.device)
    buffers = list(state.method.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        values = _accumulate(state, batch, clock, plan, times)
    except BaseException:
        _restore(buffers, before)
        state.optimizer.zero_grad()
        raise
    norm, applied = _settle_gradients(state, values["train/loss"], plan.clip_norm)
    state.whole = False
    state.method.before_update(clock)
    state.optimizer.found_inf = 1 - applied  # type: ignore[attr-defined]  # read by the fused kernels
    state.optimizer.step()
    state.optimizer.zero_grad()
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(applied > 0, buffer, old))
    state.method.after_update(clock, applied)
    if state.ema is not None:
        state.ema.update(plan.ema_decay(state.step), applied)
    if state.loss_scale is not None:
        state.loss_scale.update(applied)
    state.step += 1
    state.whole = True
    values["train/grad_norm"] = norm
    times.lap("optimizer")
    return StepReport(state.step, clock, pace, values, applied, batch.ids, len(batch), times)


def _accumulate(state: TrainState, batch: Batch, clock: Clock, plan: StepPlan, times: Stopwatch) -> dict[str, Tensor]:
    """Gradients of the mean loss over the batch, left on the parameters; the mean of what was said."""
    total: dict[str, Tensor] = {}
    for index, part in enumerate(batch.split(plan.accumulate)):
        seed_layers(plan.seed, state.step, plan.rank, index)
        with plan.autocast():
            losses = plan.forward(part, clock)
        times.lap("forward")
        weight = len(part) / len(batch)
        loss = losses.total * weight
        (loss if state.loss_scale is None else loss * state.loss_scale.scale).backward()
        times.lap("backward")
        for name, value in _named(losses).items():
            share = value.detach().float() * weight
            total[name] = total[name] + share if name in total else share
    return total


def _named(losses: Losses) -> Mapping[str, Tensor]:
    return {
        "train/loss": losses.total,
        **{f"loss/{name}": value for name, value in losses.parts.items()},
        **{f"train/{name}": value for name, value in losses.measures.items()},
    }


@torch.no_grad()
def _settle_gradients(state: TrainState, loss: Tensor, clip_norm: float | None) -> tuple[Tensor, Tensor]:
    """Unscale and clip in one pass over the gradients; the norm before the clip, and 1 if all is finite."""
    grads = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    factor: Tensor | None = None
    if state.loss_scale is not None:
        factor = 1 / state.loss_scale.scale
        norm = norm * factor
    if clip_norm is not None:
        shrink = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = shrink if factor is None else factor * shrink
    if factor is not None:
        torch._foreach_mul_(grads, factor)
    applied = (torch.isfinite(loss) & torch.isfinite(norm)).float()
    return norm, applied


def _restore(buffers: list[Tensor], before: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)
