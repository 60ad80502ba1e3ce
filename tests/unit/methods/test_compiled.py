"""Compiled networks: the clock compiles nothing again, and the method computes what it did."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch, DataFacts
from opsin.methods.base import Method
from opsin.nn.vit import Block
from opsin.run.recipe import read
from opsin.training.evaluator import untouched
from opsin.training.optim import build_optimizer, schedule_setter
from opsin.training.state import StepPlan, TrainState
from opsin.training.step import train_step

# The compiler looks at it, and hides the warning where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

STEPS = 8
COUNT = 4
SMALL = ("model.width=16", "model.heads=2", "model.depth=10")
RECIPES: dict[str, tuple[str, ...]] = {
    "dino-imagenet-vits16": (
        *SMALL,
        "data.image_size=32",
        "model.patch=4",
        "method.prototypes=16",
        "method.hidden=16",
        "method.bottleneck=8",
        "method.views.local_size=16",
        "method.warmup_temperature_epochs=5",
        "method.freeze_epochs=3",
    ),
    "hjepa-cifar10": (*SMALL, "data.image_size=16", "method.predictor_width=16", "method.predictor_depth=2"),
    "cifar10-vit-strong": (*SMALL, "model.pool=mean"),
    "cifar10-cpu": ("model.widths=[8,8,8]", "model.convs=[2,2,2]"),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def trained(name: str, *changes: str, compiled: bool) -> tuple[Method, list[int], list[float]]:
    """A method after some steps, an epoch each; the forms that were compiled so far and the loss, step by step."""
    recipe = read(name, ["data.path=x", *RECIPES[name], *changes])
    size = recipe.data.image_size
    torch.manual_seed(0)
    method = recipe.method.build(recipe.model, DataFacts(tuple("abc"), 1000, size, 3, (0.5,) * 3, (0.5,) * 3)).train()
    if compiled:
        method.compile_networks("eager")  # needs no C++ compiler: what is compiled is the same
    timeline = Timeline([Stage(epochs=STEPS, batch_size=COUNT, steps_per_epoch=1)])
    setter = schedule_setter(recipe.optim, method)
    plan = StepPlan(method, timeline.clock, setter, nullcontext, seed=0, clip_norm=recipe.optim.clip_norm)
    state = TrainState(method, build_optimizer(recipe.optim, method))
    forms, losses = [], []
    for step in range(STEPS):
        losses.append(train_step(state, batch_of(method, size, step), plan).values["train/loss"].item())
        forms.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return method, forms, losses


def batch_of(method: Method, size: int, step: int) -> Batch:
    views, ids = method.views(size), torch.arange(COUNT)
    generator = torch.Generator().manual_seed(step)
    images = {
        name: torch.randn(crop.count, COUNT, 3, crop.size, crop.size, generator=generator)
        for name, crop in views.crops.items()
    }
    masks: Any = {} if views.masks is None else views.masks(0, 0, ids)  # of one length, as on most grids
    return Batch(images, ids % 3, ids, masks)


@pytest.mark.parametrize("name", RECIPES)
def test_the_clock_compiles_nothing_again(name: str) -> None:
    """Temperatures, resting layers and drop path by depth once made compiled code anew until torch gave up."""
    _, forms, _ = trained(name, compiled=True)
    assert forms[0] > 0
    assert forms[-1] == forms[1], forms
    assert forms[-1] <= 16, "blocks share their code"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", ["dino-imagenet-vits16", "hjepa-cifar10"])
def test_compiled_networks_learn_the_same(name: str) -> None:
    # Random numbers are drawn in another way by compiled code.
    changes = ("model.drop_path=0", "model.dropout=0", "model.depth=2")
    plain, _, expected = trained(name, *changes, compiled=False)
    method, _, losses = trained(name, *changes, compiled=True)
    # Float32 after some steps, with sums in another order.
    assert losses == pytest.approx(expected, rel=1e-4)
    assert method.state_dict().keys() == plain.state_dict().keys()


def test_drop_path_of_compiled_code_keeps_the_mean() -> None:
    method, _, _ = trained("cifar10-vit-strong", "model.drop_path=0.4", "model.depth=1", compiled=False)
    block = method.backbone.get_submodule("blocks.0")
    assert isinstance(block, Block)
    factors = torch.compile(block._draw, backend="eager")(torch.empty(20_000, 1, 1), torch.tensor(0.6))
    assert factors.unique().tolist() == pytest.approx([0, 1 / 0.6])
    # The share of 20,000 draws has a deviation of 0.0035: five of them.
    assert (factors > 0).float().mean().item() == pytest.approx(0.6, abs=0.018)


def test_evaluation_leaves_the_compiler_out() -> None:
    method, forms, _ = trained("cifar10-vit-strong", compiled=True)
    with untouched(method, torch.device("cpu")):
        method.encode(torch.randn(3, 3, 32, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == forms[-1]
