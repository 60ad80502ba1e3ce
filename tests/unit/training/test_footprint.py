"""The memory of an update on tensors without content, against what torch's allocator hands out in a real one."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from opsin.data.base import Batch, Views
from opsin.nn.ema import ModelEma
from opsin.run.parts import build_parts
from opsin.run.recipe import read
from opsin.storage.teller import Silence
from opsin.training import precision
from opsin.training.footprint import UpdateTrial
from opsin.training.optim import AdamW, build_optimizer, schedule_setter
from opsin.training.state import StepPlan, TrainState
from opsin.training.step import train_step
from tests.digits_run import CONVNET
from tests.unit.training.test_step import Small, plan_for

pytestmark = pytest.mark.usefixtures("torch_switches")

RECIPES = {
    "vit": ("quickstart", "precision=bf16", "ema.decay=0.9", "memory.checkpoint_blocks=true"),
    "convnet": ("quickstart", *CONVNET, "precision=fp32", "optim.name=muon", "optim.lr=0.01", "accumulate=2"),
    "dino": ("dino-digits", "precision=bf16", "memory.view_chunk=1"),
    "ijepa": ("ijepa-digits", "precision=fp32"),
}


def taken_by(state: TrainState, batch: Batch, plan: StepPlan) -> int:
    """Bytes at the worst moment of the second update, above those that lived when it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train_step(state, batch, plan)
        with record_function("second"):
            train_step(state, batch, plan)
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    (start,) = [event.start_ns() for event in events if event.name() == "second"]
    memory = sorted(
        (event for event in events if event.name() == "[memory]" and event.start_ns() >= start),
        key=lambda event: event.start_ns(),
    )
    level = highest = 0
    for event in memory:
        level += event.nbytes()
        highest = max(highest, level)
    return highest


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_footprint_is_what_a_real_update_takes(recipe: tuple[str, ...]) -> None:
    name, *changes = recipe
    wanted = read(name, [*changes, "device=cpu", "batch_size=48", "attention=explicit", "data.workers=0"])
    parts = build_parts(wanted, Silence())
    (stage,) = parts.timeline.stages
    step, views, ids = parts.timeline.total_steps - 2, parts.method.views(stage.image_size), torch.arange(48)
    masks = {} if views.masks is None else views.masks(0, 0, ids)
    plan = StepPlan(
        parts.method,
        parts.timeline.clock,
        schedule_setter(wanted.optim, parts.method),
        precision.autocast(parts.numerics.device, parts.numerics.precision),
        seed=0,
        accumulate=wanted.accumulate,
        view_chunk=wanted.memory.view_chunk,
        clip_norm=wanted.optim.clip_norm,
        clip_each=wanted.optim.clip == "each",
    )
    before = [param.clone() for param in parts.method.parameters()]
    trial = UpdateTrial(parts.method, wanted.optim, plan, averages=wanted.ema is not None)
    found = trial.run(views, masks, images=48, step=step)
    assert all(torch.equal(a, b) for a, b in zip(before, parts.method.parameters(), strict=True)), "nothing is trained"

    parts.method.train()
    optimizer = build_optimizer(wanted.optim, parts.method)
    state = TrainState(parts.method, optimizer, ema=ModelEma(parts.method) if wanted.ema else None, step=step)
    ids = torch.arange(48 * wanted.accumulate)
    shapes = {name: (crop.count, len(ids), 3, crop.size, crop.size) for name, crop in views.crops.items()}
    images = {name: torch.rand(shape) for name, shape in shapes.items()}
    real = taken_by(state, Batch(images, torch.zeros_like(ids), ids, masks), plan)
    # From below within 3 %, for blocks of a few bytes. From above less closely: autograd adds the gradients of a tensor
    # with two uses in place, but those without content into a new one, which in networks this small shows.
    assert 0.97 * real <= found.transient <= 1.2 * real
    kept = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    tensors = [*parts.method.parameters(), *parts.method.buffers()]
    averaged = sum(tensor.nbytes for tensor in tensors) if wanted.ema else 0
    assert found.state == sum(tensor.nbytes for tensor in (*tensors, *kept)) + averaged


def test_a_trial_that_fails_leaves_random_numbers_and_gradients() -> None:
    method, config = Small(), AdamW(lr=0.1)
    plan = plan_for(method, config)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    views = Views({})
    with pytest.raises(KeyError):
        UpdateTrial(method, config, plan).run(views, {}, images=4, step=0)
    assert torch.equal(torch.rand(3), expected)
    assert not any(param.grad is not None for param in method.parameters())
