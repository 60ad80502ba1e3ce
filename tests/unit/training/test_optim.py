"""What an optimizer is given: every parameter once, its decay, and its learning rate for every clock."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from opsin.clock.schedule import Constant, Cosine, OneCycle
from opsin.clock.timeline import Stage, Timeline
from opsin.methods.base import (
    Batch,
    Clock,
    DataFacts,
    Losses,
    Method,
    ParamGroup,
    Views,
    split_by_decay,
)
from opsin.methods.supervised import SupervisedConfig
from opsin.nn.timm_backbone import TimmBackbone, TimmConfig
from opsin.nn.vit import ViTConfig
from opsin.training.optim import SGD, AdamW, OptimConfig, build_optimizer, schedule_setter

TIMELINE = Timeline([Stage(epochs=1, batch_size=8, steps_per_epoch=10)])


class TwoParts(Method):
    """A body and a head whose learning rate is a factor of time; `groups` replaces its own groups."""

    def __init__(self, groups: Sequence[ParamGroup] | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)
        self.groups = groups

    def views(self, image_size: int) -> Views:
        return Views({})

    def forward(self, batch: Batch, clock: Clock) -> Losses:
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
    set_schedule = schedule_setter(config, method)
    rates = {}
    for step in (0, 5):
        scheduled = set_schedule(optimizer, TIMELINE.clock(step))
        assert (scheduled.lr, scheduled.momentum) == pytest.approx((0.1 if step == 0 else 0.05, 0.9))
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
    schedule_setter(config, method)(optimizer, TIMELINE.clock(5))
    optimizer.step()
    torch.testing.assert_close(method.head.bias.detach(), before - 0.05)  # the head has half the rate
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


def test_a_parameter_that_a_method_forgets_or_repeats_is_our_own_fault() -> None:
    whole = split_by_decay(TwoParts())
    with pytest.raises(AssertionError, match=r"without a group: .*'body.0.bias'"):
        build_optimizer(AdamW(), TwoParts([]))
    with pytest.raises(AssertionError, match="stands in two groups"):
        build_optimizer(AdamW(), TwoParts([*whole, *whole]))


def test_layers_learn_the_slower_the_nearer_they_are_to_the_image() -> None:
    torch.manual_seed(0)
    facts = DataFacts(("a", "b"), samples=8, image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    method = SupervisedConfig(head_lr_factor=2.0).build(ViTConfig(width=16, depth=3, heads=2, patch=4), facts)
    config = AdamW(lr=1.0, layer_decay=0.5, schedule=Constant())
    optimizer = build_optimizer(config, method)
    schedule_setter(config, method)(optimizer, TIMELINE.clock(0))
    rates = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}
    found = {name: rates[id(param)] for name, param in method.named_parameters()}
    assert found["head.linear.weight"] == 2.0
    assert found["backbone.norm.weight"] == found["backbone.blocks.2.attn.qkv.weight"] == 0.5
    assert found["backbone.blocks.0.mlp.fc1.bias"] == 0.125
    assert found["backbone.patch_embed.proj.weight"] == found["backbone.pos_embed"] == 0.0625


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_layers_of_timm_networks_have_timms_own_rates(name: str) -> None:
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]  # public, but not in __all__

    backbone = TimmConfig(name=name).build(image_size=32)
    layers = backbone.layers()
    assert layers.keys() == {parameter for parameter, _ in backbone.named_parameters()}
    last = max(layers.values()) + 1
    assert isinstance(backbone, TimmBackbone)
    theirs = {
        id(param): group["lr_scale"]
        for group in param_groups_layer_decay(backbone.network, layer_decay=0.5)
        for param in group["params"]
    }
    # Their last layer has the full rate, ours leaves it to the head.
    for parameter, param in backbone.named_parameters():
        assert 0.5 ** (last - layers[parameter]) == pytest.approx(0.5 * theirs[id(param)])


def test_the_linear_rule_follows_the_batch_size_up_to_its_ceiling() -> None:
    config = SGD(lr="linear")
    assert [config.peak_lr(batch) for batch in (64, 256, 1024, 4096)] == pytest.approx([0.025, 0.1, 0.4, 0.4])


@each_config
def test_a_stage_scales_the_rate_and_the_schedule_sets_the_momentum(config: OptimConfig) -> None:
    cycle = OneCycle(start=1.0, peak=0.5, end=1.0, momentum=(0.95, 0.85))
    config = config.model_copy(update={"schedule": cycle, "lr": 0.1})
    timeline = Timeline([Stage(1, 8, 10), Stage(1, 8, 10, lr_scale=0.5)])
    method = TwoParts()
    optimizer = build_optimizer(config, method)
    set_schedule = schedule_setter(config, method)
    assert (set_schedule(optimizer, timeline.clock(0)).lr, set_schedule(optimizer, timeline.clock(15)).lr) == (
        0.1,
        0.05,
    )
    scheduled = set_schedule(optimizer, timeline.clock(10))
    assert (scheduled.lr, scheduled.momentum) == pytest.approx((0.05, 0.85))
    for group in optimizer.param_groups:
        assert (group["momentum"] if isinstance(config, SGD) else group["betas"][0]) == pytest.approx(0.85)
