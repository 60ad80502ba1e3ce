"""What every method owes the loop. Runs over every member of `MethodConfig` there is."""

import copy
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module

import pytest
import torch
from torch import Tensor

import opsin.methods
from opsin.clock.seeding import uniform
from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch, DataFacts
from opsin.data.loading import LoadingPlan, TrainingData
from opsin.data.order import Order
from opsin.data.quarantine import Quarantine
from opsin.data.sources.digits import load_digits
from opsin.methods.base import Method, MethodConfig
from opsin.nn.attention import choose_attention, set_attention
from opsin.nn.vit import ViTConfig
from opsin.training import precision
from opsin.training.optim import AdamW, build_optimizer, schedule_setter
from opsin.training.state import StepPlan, TrainState
from opsin.training.step import train_step

for _module in pkgutil.iter_modules(opsin.methods.__path__):
    import_module(f"opsin.methods.{_module.name}")

NAMES = sorted(name for name, member in MethodConfig.members().items() if member.__module__.startswith("opsin."))
FACTS = DataFacts(tuple("abc"), samples=64, image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
MODEL = ViTConfig(width=32, depth=2, heads=2, patch=4, dropout=0.1, drop_path=0.1)
PATCHES_ONLY = MODEL.model_copy(update={"class_token": False, "pool": "mean", "position": "sincos", "patch": 2})
MODELS = {"ijepa": PATCHES_ONLY, "hjepa": PATCHES_ONLY}
TIMELINE = Timeline([Stage(epochs=10, batch_size=16, steps_per_epoch=4)])
OPTIM = AdamW(lr=1e-3, clip_norm=1.0)

pytestmark = pytest.mark.parametrize("name", NAMES)


def config_of(name: str) -> MethodConfig:
    """The method's settings, all at their defaults."""
    return MethodConfig.members()[name].model_validate({})


def build(name: str, facts: DataFacts = FACTS) -> Method:
    torch.manual_seed(0)
    return config_of(name).build(MODELS.get(name, MODEL), facts)


def batch_for(method: Method, step: int = 0, size: int = 16) -> Batch:
    ids = torch.arange(size) + 1000 * step
    views: dict[str, Tensor] = {}
    wanted = method.views(FACTS.image_size)
    for view, crop in wanted.crops.items():
        count = crop.count * size * 3 * crop.size**2
        pixels = uniform(0, step, torch.arange(count), view, 1)
        views[view] = (pixels.reshape(crop.count, size, 3, crop.size, crop.size) - 0.5) * 4
    masks = wanted.masks(0, step, ids) if wanted.masks is not None else {}
    return Batch(views, ids % 3, ids, masks)


def plan_for(method: Method, autocast: Callable[[], AbstractContextManager[None]] = nullcontext) -> StepPlan:
    return StepPlan(method, TIMELINE.clock, schedule_setter(OPTIM, method), autocast, seed=3, clip_norm=OPTIM.clip_norm)


def fresh(name: str) -> TrainState:
    method = build(name)
    return TrainState(method, build_optimizer(OPTIM, method))


def tensors(method: Method) -> list[Tensor]:
    return [*method.parameters(), *method.buffers()]


def test_the_settings_survive_being_written_and_read(name: str) -> None:
    config = config_of(name)
    assert type(config).model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_finite_scalars(name: str, precision: str) -> None:
    method = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        losses = method(batch_for(method), TIMELINE.clock(0))
    for value in (losses.total, *losses.parts.values(), *losses.measures.values()):
        assert value.shape == ()
        assert value.isfinite()
    assert all(not value.requires_grad for value in losses.measures.values())


def test_every_trainable_parameter_learns_and_no_frozen_one(name: str) -> None:
    method = build(name)
    # In the middle of a run: some layers rest at the beginning.
    method(batch_for(method), TIMELINE.clock(TIMELINE.total_steps // 2)).total.backward()
    lazy = [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    touched = [n for n, p in method.named_parameters() if not p.requires_grad and p.grad is not None]
    assert lazy == []
    assert touched == []


def test_the_groups_hold_every_trainable_parameter_once_and_spare_vectors_from_decay(name: str) -> None:
    method = build(name)
    grouped = [param for group in method.param_groups() for param in group.params]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in method.parameters() if p.requires_grad}
    assert all(param.ndim > 1 for group in method.param_groups() if group.decay for param in group.params)


def test_features_have_one_vector_per_image_and_per_patch(name: str) -> None:
    method = build(name).eval()
    tokens = method.encode(torch.zeros(5, 3, 16, 16))
    assert tokens.pooled.shape == (5, 32)
    assert tokens.patches.shape == (5, (16 // MODELS.get(name, MODEL).patch) ** 2, 32)


def test_a_bad_batch_changes_nothing(name: str) -> None:
    state = fresh(name)
    train_step(state, batch_for(state.method), plan_for(state.method))
    before = copy.deepcopy(tensors(state.method))
    bad = batch_for(state.method, 1)
    next(iter(bad.views.values())).view(-1)[7] = float("nan")
    report = train_step(state, bad, plan_for(state.method))
    assert report.applied == 0
    assert all(torch.equal(a, b) for a, b in zip(tensors(state.method), before, strict=True))


def test_the_loss_falls_on_a_batch_seen_again_and_again(name: str) -> None:
    state = fresh(name)
    batch = batch_for(state.method)
    losses = [float(train_step(state, batch, plan_for(state.method)).values["train/loss"]) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_run_continued_from_its_state_gives_the_same_bits(name: str) -> None:
    straight = fresh(name)
    for step in range(10):
        train_step(straight, batch_for(straight.method, step), plan_for(straight.method))
    first = fresh(name)
    for step in range(5):
        train_step(first, batch_for(first.method, step), plan_for(first.method))
    second = fresh(name)
    second.method.load_state_dict(copy.deepcopy(first.method.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.step = first.step
    torch.rand(13)
    for step in range(5, 10):
        train_step(second, batch_for(second.method, step), plan_for(second.method))
    assert all(torch.equal(a, b) for a, b in zip(tensors(straight.method), tensors(second.method), strict=True))


def updated_on(device: torch.device, name: str) -> tuple[list[float], list[Tensor]]:
    """The losses of three updates there, and the weights after them."""
    torch.manual_seed(0)
    method = config_of(name).build(MODELS.get(name, MODEL).without_drops(), FACTS).to(device)
    state = TrainState(method, build_optimizer(OPTIM, method))
    losses = [
        float(train_step(state, batch_for(method, step).to(device), plan_for(method)).values["train/loss"])
        for step in range(3)
    ]
    return losses, [tensor.detach().cpu() for tensor in tensors(method)]


@pytest.mark.gpu
@pytest.mark.usefixtures("torch_switches")
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_a_gpu_gives_the_same_bits_again(name: str, number_format: str) -> None:
    device = torch.device("cuda")
    precision.configure(device, number_format, deterministic=True)
    runs = []
    for _ in range(2):
        method = build(name).to(device)
        set_attention(method, choose_attention(device, number_format)[0])
        state = TrainState(method, build_optimizer(OPTIM, method))
        plan = plan_for(method, precision.autocast(device, number_format))
        for step in range(4):
            train_step(state, batch_for(method, step).to(device), plan)
        runs.append([tensor.cpu() for tensor in tensors(method)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("torch_switches")
def test_a_gpu_makes_the_updates_of_the_cpu(name: str) -> None:
    expected_losses, expected = updated_on(torch.device("cpu"), name)
    precision.configure(torch.device("cuda"), "fp32", deterministic=True)
    losses, found = updated_on(torch.device("cuda"), name)
    # float32 sums in another order, after three updates; Adam moves a weight whose gradient is noise by up to its
    # learning rate of 1e-3 in either direction.
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=6e-3)


def test_kept_images_and_workers_give_the_views_of_a_method_alike(name: str) -> None:
    digits = load_digits()
    facts = DataFacts(digits.classes, len(digits), image_size=16, channels=3, mean=(0.3,) * 3, std=(0.4,) * 3)
    timeline = Timeline([Stage(epochs=2, batch_size=40, steps_per_epoch=len(digits) // 40)])
    views = build(name, facts).views(facts.image_size)

    def batches(residence: bool, workers: int) -> list[Batch]:
        plan = LoadingPlan(source=digits, facts=facts, device=torch.device("cpu"), workers=workers, resident=residence)
        order = Order(seed=3, labels=digits.labels, timeline=timeline, drop_last=True)
        data = TrainingData(plan, [views], order, Quarantine(None, total=len(digits), limit=0.0))
        return list(data.batches(43, 46))  # the end of an epoch and the beginning of the next

    kept = batches(True, 0)
    for batch in kept:
        assert {view: crop.shape for view, crop in batch.views.items()} == {
            view: (crop.count, 40, 3, crop.size, crop.size) for view, crop in views.crops.items()
        }
        assert all(view.isfinite().all() for view in batch.views.values())
    for workers in (0, 2):
        for batch, same in zip(batches(False, workers), kept, strict=True):
            assert torch.equal(batch.ids, same.ids)
            assert torch.equal(batch.labels, same.labels)
            assert all(torch.equal(view, same.views[wanted]) for wanted, view in batch.views.items())
            assert all(torch.equal(mask, same.masks[wanted]) for wanted, mask in batch.masks.items())
