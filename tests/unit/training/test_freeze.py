"""Frozen layers get no gradient, keep optimizer state and statistics, and learn again when a later stage lets them."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch

from opsin.clock.schedule import Constant
from opsin.clock.timeline import Stage, Timeline
from opsin.errors import ConfigError
from opsin.methods.base import DataFacts
from opsin.methods.dino import DinoConfig
from opsin.methods.supervised import Supervised, SupervisedConfig
from opsin.nn.convnet import ConvNetConfig
from opsin.training.freeze import LayerFreezer
from opsin.training.optim import SGD, AdamW, MuonConfig, OptimConfig, build_optimizer, schedule_setter
from opsin.training.state import StepPlan, TrainState
from opsin.training.step import train_step
from tests.contract.test_methods import batch_for

FACTS = DataFacts(tuple("abc"), samples=64, image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
HEAD = ("head.*",)
TIMELINE = Timeline([Stage(1, 16, 3, image_size=16, train=HEAD), Stage(1, 16, 3, image_size=16)])
OPTIMIZERS = [
    AdamW(lr=0.01, schedule=Constant()),
    SGD(lr=0.01, schedule=Constant()),
    MuonConfig(lr=0.01, unit_filters=True, schedule=Constant()),
]
each_optimizer = pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda config: str(config.name))


def classifier() -> Supervised:
    torch.manual_seed(0)
    return SupervisedConfig().build(ConvNetConfig(widths=(8, 8, 8)), FACTS)


def start(config: OptimConfig) -> tuple[TrainState, StepPlan]:
    method = classifier()
    plan = StepPlan(
        method, TIMELINE.clock, schedule_setter(config, method), nullcontext, seed=0, set_layers=LayerFreezer(method)
    )
    return TrainState(method.train(), build_optimizer(config, method)), plan


@each_optimizer
def test_a_frozen_backbone_stays_as_it_is_while_the_head_learns(config: OptimConfig) -> None:
    state, plan = start(config)
    before = {name: tensor.clone() for name, tensor in state.method.state_dict().items()}
    for step in range(3):
        train_step(state, batch_for(state.method, step), plan)
    after = state.method.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.linear.weight", "head.linear.bias"}, "running statistics of frozen norms stay too"
    moments = {id(param): values for param, values in state.optimizer.state.items()}
    for name, param in state.method.named_parameters():
        kept = [value for value in moments.get(id(param), {}).values() if value.ndim]
        touched = any(value.any() for value in kept)
        assert touched == name.startswith("head."), name


@each_optimizer
def test_a_backbone_that_is_set_free_learns_as_if_it_began_then(config: OptimConfig) -> None:
    state, plan = start(config)
    for step in range(3):
        train_step(state, batch_for(state.method, step), plan)
    fresh = classifier()
    fresh.load_state_dict(state.method.state_dict())
    begun = TrainState(fresh.train(), build_optimizer(config, fresh), step=3)
    for name, param in fresh.head.named_parameters():  # the head has its moments from the stage before
        begun.optimizer.state[param] = deepcopy(state.optimizer.state[state.method.get_parameter(f"head.{name}")])
    other = StepPlan(fresh, TIMELINE.clock, schedule_setter(config, fresh), nullcontext, seed=0)
    for step in (3, 4):
        batch = batch_for(state.method, step)
        train_step(state, batch, plan)
        train_step(begun, batch, other)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, state.method.state_dict()[name]), name


def test_what_never_learns_by_construction_is_not_set_free() -> None:
    method = classifier()
    freezer = LayerFreezer(method)
    freezer.set_trainable(HEAD)
    freezer.set_trainable(("*",))
    assert not method.get_parameter("backbone.whiten.weight").requires_grad
    assert not method.get_parameter("backbone.blocks.0.norm1.weight").requires_grad
    assert method.get_parameter("backbone.blocks.0.conv1.weight").requires_grad
    assert all(module.training for module in method.modules())


def test_a_pattern_may_name_a_part_of_the_backbone() -> None:
    method = classifier()
    freezer = LayerFreezer(method)
    freezer.set_trainable(("head.*", "backbone.blocks.2.*"))
    learning = {name for name, param in method.named_parameters() if param.requires_grad}
    assert {name.split(".")[2] for name in learning if name.startswith("backbone")} == {"2"}
    norms = {name: module.training for name, module in method.named_modules() if name.endswith("norm1")}
    assert norms == {
        "backbone.blocks.0.norm1": False,
        "backbone.blocks.1.norm1": False,
        "backbone.blocks.2.norm1": True,
    }
    assert set(freezer.frozen(("head.*",))) >= {"backbone.blocks.0.conv1.weight", "backbone.blocks.2.norm2.bias"}


def test_a_pattern_that_matches_nothing_is_an_error_that_shows_the_names() -> None:
    freezer = LayerFreezer(classifier())
    with pytest.raises(ConfigError, match=r"stages.1.train: 'blocks.\*' matches no parameter; .*backbone.blocks.0"):
        freezer.check(("head.*", "blocks.*"), key="stages.1.train")
    with pytest.raises(ConfigError, match=r"stages.0.train: no pattern"):
        freezer.check((), key="stages.0.train")


def test_a_norm_whose_offset_learns_follows_the_images() -> None:
    method = classifier()
    LayerFreezer(method).set_trainable(("backbone.blocks.1.norm1.bias", "head.*"))
    norms = {name: module.training for name, module in method.named_modules() if name.endswith("norm1")}
    assert norms == {
        "backbone.blocks.0.norm1": False,
        "backbone.blocks.1.norm1": True,
        "backbone.blocks.2.norm1": False,
    }


@pytest.mark.parametrize("patterns", [("*",), ("student*", "prototypes*"), ("student_head.*",)])
def test_the_norms_of_a_teacher_are_left_alone_however_the_layers_are_named(patterns: tuple[str, ...]) -> None:
    method = DinoConfig(prototypes=8, hidden=16, bottleneck=8).build(ConvNetConfig(widths=(8, 8, 8)), FACTS).train()
    LayerFreezer(method).set_trainable(patterns)
    norms = {name: module.training for name, module in method.named_modules() if name.endswith(".norm1")}
    assert {name.partition(".")[0] for name in norms} == {"student", "backbone"}
    assert all(learns for name, learns in norms.items() if name.startswith("backbone."))
    frozen = patterns == ("student_head.*",)
    assert all(learns != frozen for name, learns in norms.items() if name.startswith("student."))


def test_a_freezer_that_forgets_freezes_anew_what_was_set_free_meanwhile() -> None:
    """As a rollback to step 0 does."""
    method = classifier()
    freezer = LayerFreezer(method)
    freezer(TIMELINE.clock(0))
    frozen = {name: param.requires_grad for name, param in method.named_parameters()}
    learning = {name: module.training for name, module in method.named_modules()}
    for name, param in method.named_parameters():
        param.requires_grad = name in freezer.learnable
    method.train()
    freezer.forget()
    freezer(TIMELINE.clock(1))
    assert {name: param.requires_grad for name, param in method.named_parameters()} == frozen
    norms = [name for name, module in method.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {name: method.get_submodule(name).training for name in norms} == {name: learning[name] for name in norms}
