"""`train_step` against plain PyTorch written out."""

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.clock.schedule import Constant
from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch
from opsin.methods.base import Clock, Losses, Method, ParamGroup, Views, split_by_decay
from opsin.training.optim import SGD, AdamW, OptimConfig, build_optimizer, schedule_setter
from opsin.training.state import LossScale, StepPlan, TrainState
from opsin.training.step import train_step

TIMELINE = Timeline([Stage(epochs=1, batch_size=128, steps_per_epoch=100)])


class Small(Method):
    """Two layers on 6 numbers, with dropout or batch norm if wanted, and an average of its weights."""

    def __init__(self, *, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, 3)
        self.average = nn.Buffer(torch.zeros(3, 8))

    def views(self, image_size: int) -> Views:
        return Views({})

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        logits = self.second(self.dropout(self.norm(self.first(batch.views["image"][0]))))
        return Losses(F.cross_entropy(logits, batch.labels), measures={"spread": logits.detach().std()})

    def param_groups(self) -> Sequence[ParamGroup]:
        return split_by_decay(self)

    @torch.no_grad()
    def after_update(self, clock: Clock, applied: Tensor) -> None:
        self.average.lerp_(self.second.weight, 0.1 * applied)


def batch_of(size: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, size, 6, generator=generator)
    return Batch({"image": images}, torch.randint(3, (size,), generator=generator), torch.arange(size))


def plan_for(method: Small, config: OptimConfig, **changes: object) -> StepPlan:
    settings = {"accumulate": 1, "clip_norm": config.clip_norm, **changes}
    return StepPlan(method, TIMELINE.clock, schedule_setter(config, method), nullcontext, seed=0, **settings)  # type: ignore[arg-type]


def copy_of(state: TrainState) -> list[Tensor]:
    tensors = list(state.method.state_dict().values())
    for moments in state.optimizer.state_dict()["state"].values():
        tensors += [value for value in moments.values() if isinstance(value, Tensor)]
    return [tensor.clone() for tensor in tensors]


OPTIMIZERS = [AdamW(lr=0.01, schedule=Constant()), SGD(lr=0.1, schedule=Constant())]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=["adamw", "sgd"])
def test_a_step_equals_plain_pytorch(config: OptimConfig) -> None:
    method, plain = Small(), Small()
    state = TrainState(method, build_optimizer(config, method))
    decayed = [plain.first.weight, plain.second.weight]
    others = [plain.first.bias, plain.second.bias]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if isinstance(config, AdamW):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    for step in range(5):
        batch = batch_of(32, step)
        train_step(state, batch, plan_for(method, config))
        optimizer.zero_grad()
        plain(batch, TIMELINE.clock(step)).total.backward()
        optimizer.step()
    # The fused kernels order the same products differently: a few roundings of fp32 in five steps.
    for name, value in plain.named_parameters():
        torch.testing.assert_close(method.get_parameter(name), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [128, 127])
@pytest.mark.parametrize("config", OPTIMIZERS, ids=["adamw", "sgd"])
def test_four_parts_equal_the_whole_batch(config: OptimConfig, size: int) -> None:
    weights = []
    for parts in (1, 4):
        method = Small().double()  # in double, so that only a wrong weighting could show
        state = TrainState(method, build_optimizer(config, method))
        batch = batch_of(size)
        batch = Batch({"image": batch.views["image"].double()}, batch.labels, batch.ids)
        report = train_step(state, batch, plan_for(method, config, accumulate=parts))
        weights.append([*method.parameters(), report.values["train/loss"], report.values["train/grad_norm"]])
    for one, four in zip(*weights, strict=True):
        torch.testing.assert_close(four, one, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("config", OPTIMIZERS, ids=["adamw", "sgd"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_bad_batch_changes_nothing_but_the_counter(config: OptimConfig, first: bool) -> None:
    method = Small(norm=True)
    state = TrainState(method, build_optimizer(config, method))
    plan = plan_for(method, config, clip_norm=1.0)
    if not first:
        train_step(state, batch_of(32), plan)
    step, before = state.step, copy_of(state)
    bad = batch_of(32, 1)
    bad.views["image"][0, 5, 2] = float("nan")
    report = train_step(state, bad, plan)
    assert report.applied == 0
    assert state.step == step + 1
    after = copy_of(state)
    if first and isinstance(config, AdamW):
        # AdamW lays out its moments at the first step: zeros and a count of zero, which is no change.
        after = [value for value in after if value.any()]
        before = [value for value in before if value.any()]
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("config", OPTIMIZERS, ids=["adamw", "sgd"])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_training_goes_on_as_if_the_bad_batch_had_been_skipped(config: OptimConfig, bad_step: int) -> None:
    def train(*, poisoned: bool) -> list[Tensor]:
        method = Small(norm=True)
        state = TrainState(method, build_optimizer(config, method))
        plan = plan_for(method, config)
        for step in range(5):
            batch = batch_of(32, step)
            if step == bad_step:
                if not poisoned:
                    state.step += 1
                    continue
                batch.views["image"][0, 0, 0] = float("inf")
            train_step(state, batch, plan)
        return copy_of(state)

    assert all(torch.equal(a, b) for a, b in zip(train(poisoned=True), train(poisoned=False), strict=True))


def test_the_gradient_is_clipped_to_its_norm_as_torch_clips_it() -> None:
    config = SGD(lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, schedule=Constant(), clip_norm=0.05)
    method, plain = Small(), Small()
    state = TrainState(method, build_optimizer(config, method))
    batch = batch_of(32)
    report = train_step(state, batch, plan_for(method, config))
    plain(batch, TIMELINE.clock(0)).total.backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    torch.testing.assert_close(report.values["train/grad_norm"], norm)
    for name, value in plain.named_parameters():
        assert value.grad is not None
        # One product and one difference in fp32.
        torch.testing.assert_close(method.get_parameter(name), value - value.grad, rtol=1e-6, atol=1e-7)


def test_loss_scaling_changes_no_update_and_the_scale_follows_its_rule() -> None:
    config = AdamW(lr=0.01, schedule=Constant(), clip_norm=0.5)
    results = []
    for scale in (None, 1024.0):
        method = Small()
        loss_scale = None if scale is None else LossScale.start(torch.device("cpu"), scale)
        state = TrainState(method, build_optimizer(config, method), loss_scale)
        for step in range(3):
            train_step(state, batch_of(32, step), plan_for(method, config))
        results.append([p.clone() for p in method.parameters()])
    # A power of two scales exactly; only the clip factor rounds.
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-8)

    scaling = LossScale.start(torch.device("cpu"), 8.0)
    scaling.interval = 2
    seen = []
    for applied in (1, 1, 1, 0, 1, 1):
        scaling.update(torch.tensor(float(applied)))
        seen.append(scaling.scale.item())
    assert seen == [8, 16, 16, 8, 8, 16]


def test_dropout_repeats_with_the_step_and_not_with_the_generator() -> None:
    config = SGD(lr=0.1, schedule=Constant())
    weights = []
    for burned in (0, 17):
        method = Small(dropout=0.5)
        state = TrainState(method, build_optimizer(config, method), step=7)
        torch.rand(burned)
        train_step(state, batch_of(32), plan_for(method, config))
        weights.append(method.first.weight.clone())
    assert torch.equal(*weights)


def test_an_exception_in_the_forward_leaves_the_state_whole() -> None:
    config = SGD(lr=0.1, schedule=Constant())
    method = Small(norm=True)
    state = TrainState(method, build_optimizer(config, method))
    before = copy_of(state)
    batch = batch_of(32)
    wrong = Batch(batch.views, torch.full_like(batch.labels, 99), batch.ids)
    with pytest.raises(IndexError):
        train_step(state, wrong, plan_for(method, config))
    assert state.whole
    assert all(torch.equal(a, b) for a, b in zip(copy_of(state), before, strict=True))
    assert all(p.grad is None for p in method.parameters())
