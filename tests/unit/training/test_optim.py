"""What an optimizer is given: every parameter once, its decay, and its learning rate for every clock."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from opsin.methods.base import Batch, Clock, Losses, Method, ParamGroup, Tokens, Views, split_by_decay
from opsin.schedule import Constant, Cosine
from opsin.training.optim import SGD, AdamW, OptimConfig, build_optimizer, lr_setter


class TwoParts(Method):
    """A body and a head whose learning rate is a factor of time; `groups` replaces its own groups."""

    def __init__(self, groups: Sequence[ParamGroup] | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)
        self.groups = groups

    def views(self) -> Views:
        return Views({})

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tokens:
        raise NotImplementedError

    def param_groups(self) -> Sequence[ParamGroup]:
        if self.groups is not None:
            return self.groups
        half = split_by_decay(self.head, name="head.", lr_factor=lambda clock: 0.0 if clock.step < 2 else 0.5)
        return [*split_by_decay(self.body, name="body."), *half]


CONFIGS = [AdamW(lr=0.1, weight_decay=0.05), SGD(lr=0.1, weight_decay=0.05)]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)


@each_config
def test_weight_decay_spares_biases_and_norms(config: OptimConfig) -> None:
    method = TwoParts()
    optimizer = build_optimizer(config, method)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in method.named_parameters()} == {
        "body.0.weight": 0.05,
        "body.0.bias": 0.0,
        "body.1.weight": 0.0,
        "body.1.bias": 0.0,
        "body.2.weight": 0.05,
        "body.2.bias": 0.0,
        "head.weight": 0.05,
        "head.bias": 0.0,
    }


def test_frozen_parameters_are_left_out() -> None:
    method = TwoParts()
    method.body.requires_grad_(False)
    params = [p for group in build_optimizer(AdamW(), method).param_groups for p in group["params"]]
    assert {id(p) for p in params} == {id(p) for p in method.head.parameters()}


def test_each_group_follows_the_schedule_times_its_own_factor() -> None:
    method = TwoParts()
    config = AdamW(lr=0.1, schedule=Cosine(warmup_epochs=0.0))
    optimizer = build_optimizer(config, method)
    set_lr = lr_setter(config, method)
    rates = {}
    for step in (0, 5):
        assert set_lr(optimizer, Clock(step, 10, step / 10, 1.0)) == pytest.approx(0.1 if step == 0 else 0.05)
        rates[step] = {group["group_name"]: group["lr"] for group in optimizer.param_groups}
    assert rates[0] == {"body.decay": 0.1, "body.no_decay": 0.1, "head.decay": 0.0, "head.no_decay": 0.0}
    assert rates[5] == pytest.approx(
        {"body.decay": 0.05, "body.no_decay": 0.05, "head.decay": 0.025, "head.no_decay": 0.025}
    )


@each_config
def test_the_optimizer_takes_the_settings(config: OptimConfig) -> None:
    wanted = {"nesterov": True, "momentum": 0.9} if isinstance(config, SGD) else {"betas": (0.9, 0.999), "eps": 1e-8}
    for group in build_optimizer(config, TwoParts()).param_groups:
        assert {name: group[name] for name in wanted} == wanted
        assert group["fused"], "only the fused kernels can cancel an update on the device"


def test_sgd_without_momentum_has_no_velocity() -> None:
    config = SGD(lr=0.1, momentum=0.0, schedule=Constant())
    method = TwoParts()
    optimizer = build_optimizer(config, method)
    before = method.head.bias.detach().clone()
    for param in method.parameters():
        param.grad = torch.ones_like(param)
    lr_setter(config, method)(optimizer, Clock(5, 10, 0.5, 1.0))
    optimizer.step()
    torch.testing.assert_close(method.head.bias.detach(), before - 0.05)  # the head has half the rate
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


def test_a_parameter_that_a_method_forgets_or_repeats_is_our_own_fault() -> None:
    whole = split_by_decay(TwoParts())
    with pytest.raises(AssertionError, match=r"without a group: .*'body.0.bias'"):
        build_optimizer(AdamW(), TwoParts([]))
    with pytest.raises(AssertionError, match="stands in two groups"):
        build_optimizer(AdamW(), TwoParts([*whole, *whole]))
