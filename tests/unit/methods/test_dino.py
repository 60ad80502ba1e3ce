"""DINO against its definition written out, and what a student and its teacher must and must not do."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opsin.clock.schedule import Cosine
from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch
from opsin.methods.dino import Dino, DinoConfig
from opsin.nn.timm_backbone import TimmConfig
from opsin.nn.vit import ViTConfig
from opsin.training.optim import AdamW, build_optimizer, schedule_setter
from opsin.training.step import train_step
from tests.plain_dino import plain_clip, plain_line
from tests.unit.methods.dino_parts import (
    FACTS,
    OPTIM,
    VIT,
    PlainDino,
    batch_of,
    build_dino,
    dino_config,
    plan_for,
    state_of,
)
from tests.unit.methods.plain_steps import BATCH, STEPS_PER_EPOCH, TIMELINE, distance, everything, same_bits

# All is float64, save that the network resizes position embeddings in float32 (6e-8 of their size) and that the
# shares by which teacher and centre move are float32 numbers. A millionth leaves room for some of these roundings.
CLOSE = 1e-6
PIECES: list[dict[str, Any]] = [{}, {"accumulate": 2}, {"view_chunk": 1}, {"accumulate": 3, "view_chunk": 2}]
PAIRS = (("student", "backbone"), ("student_head", "teacher_head"), ("prototypes", "teacher_prototypes"))


def gradients(method: Dino, step: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a copy of the method for the whole batch of a step."""
    same = copy.deepcopy(method)
    loss = same(batch_of(step), TIMELINE.clock(step)).total
    loss.backward()
    return loss.item(), {name: param.grad for name, param in same.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("learn_scale", [False, True], ids=["unit lengths", "learned lengths"])
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_steps_equal_those_of_plain_pytorch(learn_scale: bool, pieces: dict[str, Any]) -> None:
    method = build_dino(learn_scale=learn_scale)
    plain, state, plan = PlainDino(method), state_of(method), plan_for(method, **pieces)
    for step in range(STEPS_PER_EPOCH + 2):  # over the end of the rest of the prototypes
        _, found = gradients(method, step)
        report = train_step(state, batch_of(step), plan)
        loss, scores = plain.backward(batch_of(step), step)
        assert report.values["train/loss"].item() == pytest.approx(loss, rel=CLOSE)
        resting = {"prototypes.weight_v", "prototypes.weight_g"} if step < STEPS_PER_EPOCH else set()
        trained = {name: param for name, param in plain.named().items() if name not in resting}
        expected = {name: param.grad for name, param in trained.items() if param.grad is not None}
        assert found.keys() == expected.keys()
        far = {name: distance(found[name], grad) for name, grad in expected.items()}
        assert max(far.values()) < CLOSE, far
        plain.update(scores, step)
        tensors = {**plain.named(), **plain.named_teacher(), "center": plain.center}
        far = {name: distance(method.state_dict()[name], value) for name, value in tensors.items()}
        assert max(far.values()) < CLOSE, far


def test_the_comparison_clips_some_gradients_and_leaves_others() -> None:
    plain = PlainDino(build_dino())
    plain.backward(batch_of(0), 0)
    assert OPTIM.clip_norm is not None
    over = [norm > OPTIM.clip_norm for norm in plain_clip(plain.named().values(), OPTIM.clip_norm)]
    assert any(over)
    assert not all(over)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_pieces_of_a_batch_add_up_to_the_whole(views: int) -> None:
    method, clock, batch = build_dino(learn_scale=True), TIMELINE.clock(3), batch_of(3)
    whole, pieces = copy.deepcopy(method), copy.deepcopy(method)
    losses = whole(batch, clock)
    losses.total.backward()
    total, measures, seen = 0.0, dict.fromkeys(losses.measures, 0.0), []
    for piece in pieces.chunks(batch, clock, views):
        said = pieces(piece, clock)
        said.total.backward()
        total += said.total.item()
        seen.append(sum(len(view) for view in piece.views.values()))
        for name, value in said.measures.items():
            measures[name] += value.item()
    assert seen == {1: [1, 1, 1, 1], 2: [2, 2], 3: [2, 2]}[views]
    # The same sums in another order.
    assert total == pytest.approx(losses.total.item(), rel=1e-10)
    assert measures == pytest.approx({name: value.item() for name, value in losses.measures.items()}, rel=1e-10)
    grads = {name: (param.grad, pieces.get_parameter(name).grad) for name, param in whole.named_parameters()}
    for name, (one, sum_of_pieces) in grads.items():
        if one is not None:
            assert sum_of_pieces is not None
            # Position embeddings are resized in float32, once for each piece.
            assert distance(sum_of_pieces, one) < (CLOSE if name == "student.pos_embed" else 1e-10), name
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(pieces.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("learn_scale", [False, True], ids=["unit lengths", "learned lengths"])
def test_teacher_and_student_start_alike_also_from_loaded_weights(learn_scale: bool) -> None:
    method = build_dino(learn_scale=learn_scale)
    loaded = copy.deepcopy(method.backbone.state_dict())
    method.prepare(lambda: pytest.fail("a transformer needs no images to start"))
    for student, teacher in PAIRS:
        own, slow = method.get_submodule(student).state_dict(), method.get_submodule(teacher).state_dict()
        assert same_bits(list(own.values()), list(slow.values()))
    assert same_bits(list(method.student.state_dict().values()), list(loaded.values()))


def test_teacher_gets_no_gradient_and_no_place_in_the_optimizer() -> None:
    method = build_dino(learn_scale=True)
    state = state_of(method)
    method(batch_of(2), TIMELINE.clock(2)).total.backward()
    trained = {id(param) for group in state.optimizer.param_groups for param in group["params"]}
    for student, teacher in PAIRS:
        for param in method.get_submodule(teacher).parameters():
            assert param.grad is None
            assert not param.requires_grad
            assert id(param) not in trained
        assert all(id(param) in trained for param in method.get_submodule(student).parameters())


@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_teacher_follows_once_in_an_update_the_weights_that_came_out(pieces: dict[str, Any]) -> None:
    method = build_dino(learn_scale=True)
    state = state_of(method)
    before = copy.deepcopy(method)
    train_step(state, batch_of(), plan_for(method, **pieces))
    kept = 0.9 ** (BATCH / 4)
    for student, teacher in PAIRS:
        names = [name for name, _ in method.get_submodule(student).named_parameters()]
        for name in names:
            new = method.get_submodule(student).get_parameter(name)
            expected = kept * before.get_submodule(teacher).get_parameter(name) + (1 - kept) * new
            # The share is a float32 number.
            assert distance(method.get_submodule(teacher).get_parameter(name), expected) < CLOSE, name


def test_loss_of_uniform_teacher_and_student_is_the_logarithm_of_the_prototypes() -> None:
    method = build_dino()
    with torch.no_grad():
        for prototypes in (method.prototypes, method.teacher_prototypes):
            prototypes.weight_v.copy_(prototypes.weight_v[:1].expand_as(prototypes.weight_v))
        method.center.zero_()
    losses = method(batch_of(), TIMELINE.clock(0))
    assert losses.total.item() == pytest.approx(math.log(24), rel=1e-12)
    assert losses.measures["teacher_entropy"].item() == pytest.approx(math.log(24), rel=1e-12)
    assert losses.measures["teacher_entropy_share"].item() == pytest.approx(1, rel=1e-12)
    assert losses.measures["kl"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("learn_scale", [False, True], ids=["unit lengths", "learned lengths"])
def test_weight_decay_is_for_matrices_tokens_and_lengths_alone(learn_scale: bool) -> None:
    method = dino_config(learn_scale=learn_scale).build(ViTConfig(width=12, depth=1, heads=2, patch=4), FACTS)
    state = state_of(method)
    schedule_setter(OPTIM, method)(state.optimizer, TIMELINE.clock(1))
    names = {id(param): name for name, param in method.named_parameters()}
    decay: dict[str, float] = {
        names[id(param)]: group["weight_decay"] for group in state.optimizer.param_groups for param in group["params"]
    }
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    decayed = {
        "student.cls_token",
        "student.pos_embed",
        "student.patch_embed.proj.weight",
        *(f"student.blocks.0.{layer}.weight" for layer in block),
        *(f"student_head.mlp.{index}.weight" for index in (0, 2, 4)),
        "prototypes.weight_v",
        *(["prototypes.weight_g"] if learn_scale else []),
    }
    spared = {
        "student.patch_embed.proj.bias",
        *(f"student.blocks.0.{layer}.bias" for layer in block),
        *(
            f"student.{norm}.{kind}"
            for norm in ("blocks.0.norm1", "blocks.0.norm2", "norm")
            for kind in ("weight", "bias")
        ),
        *(f"student_head.mlp.{index}.bias" for index in (0, 2, 4)),
    }
    assert {name for name, value in decay.items() if value > 0} == decayed
    assert {name for name, value in decay.items() if value == 0} == spared


def test_learning_rate_starts_at_zero_peaks_after_the_warmup_and_ends_near_its_last_value() -> None:
    config = AdamW(lr=5e-4, lr_batch_size=256, schedule=Cosine(warmup_epochs=10, end=0.01))
    timeline = Timeline([Stage(epochs=100, batch_size=64, steps_per_epoch=10)])
    method = build_dino()
    optimizer, set_schedule = build_optimizer(config, method), schedule_setter(config, method)

    def rate(step: int) -> float:
        set_schedule(optimizer, timeline.clock(step))
        (only,) = {group["lr"] for group in optimizer.param_groups}
        return float(only)

    peak = 5e-4 * 64 / 256
    assert rate(0) == 0
    assert rate(50) == pytest.approx(peak / 2)
    assert rate(100) == pytest.approx(peak)
    assert max(map(rate, range(1000))) == rate(100)
    # The last of the 900 steps of the cosine is a step short of its end: 3e-6 of the peak.
    assert rate(999) == pytest.approx(0.01 * peak, rel=1e-3)


@pytest.mark.parametrize("learn_scale", [False, True], ids=["unit lengths", "learned lengths"])
def test_prototypes_rest_in_the_first_epoch_and_move_after_it(learn_scale: bool) -> None:
    method = build_dino(learn_scale=learn_scale)
    state, plan = state_of(method), plan_for(method)
    weights = [param for param in method.prototypes.parameters() if param.requires_grad]
    assert len(weights) == 1 + learn_scale
    before = [weight.detach().clone() for weight in weights]
    layer = method.student_head.get_parameter("mlp.0.weight")
    others = layer.detach().clone()
    for step in range(STEPS_PER_EPOCH):
        train_step(state, batch_of(step), plan)
        assert same_bits(weights, before)
        assert not any(state.optimizer.state.get(weight) for weight in weights)
    assert not torch.equal(layer, others)
    train_step(state, batch_of(STEPS_PER_EPOCH), plan)
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert [state.optimizer.state[weight]["step"].item() for weight in weights] == [1] * len(weights)


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("view", ["global_1", "local"])
def test_a_batch_that_is_not_a_number_leaves_everything_as_it_was(view: str, pieces: dict[str, Any]) -> None:
    method = build_dino(learn_scale=True)
    state, plan = state_of(method), plan_for(method, **pieces)
    for step in range(STEPS_PER_EPOCH + 1):
        train_step(state, batch_of(step), plan)
    before, bad = everything(state), batch_of(3)
    bad.views[view][0, -1, 0, 0, 0] = math.nan
    assert train_step(state, bad, plan).applied == 0
    assert same_bits(everything(state), before)
    assert not method.score_sum.any()
    assert not method.score_count.any()


@pytest.mark.parametrize(("epochs", "rise"), [(6, 4), (6, 2), (6, 1), (6, 0), (3, 5)])
def test_teacher_temperature_changes_from_epoch_to_epoch_as_published(epochs: int, rise: int) -> None:
    method = build_dino(warmup_temperature_epochs=rise)
    timeline = Timeline([Stage(epochs=epochs, batch_size=BATCH, steps_per_epoch=7)])
    published = plain_line(0.04, 0.07, rise) + [0.07] * epochs
    found = [method.teacher_temperature(timeline.clock(step)) for step in range(timeline.total_steps)]
    assert found == pytest.approx([published[step // 7] for step in range(timeline.total_steps)])


def test_two_halves_of_a_batch_keep_as_much_of_teacher_and_centre_as_the_whole() -> None:
    def clock(size: int, step: int) -> float:
        return method.teacher_momentum(Timeline([Stage(3, size, 10)]).clock(step))

    method = build_dino(momentum_batch_size=8)
    for step in (0, 11, 29):
        # Half a cosine from 0.9 to 1 over the 30 steps.
        assert clock(8, step) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi * step / 30)) / 2)
        assert clock(4, step) ** 2 == pytest.approx(clock(8, step))
        assert clock(16, step) == pytest.approx(clock(8, step) ** 2)

    centers = []
    for size, updates in ((4, 2), (8, 1)):
        # Equal images, so that halves have the mean of the whole; the teacher stays, and so do its scores.
        method = build_dino(momentum=1.0, momentum_batch_size=8, center_momentum=0.7)
        time, start = Timeline([Stage(3, size, 10)]).clock(0), method.center.clone()
        views = {name: view.expand(-1, size, -1, -1, -1) for name, view in batch_of(size=1).views.items()}
        batch = Batch(views, torch.zeros(size), torch.zeros(size))
        scores = torch.empty(0)
        for _ in range(updates):
            method(batch, time)
            scores = method.score_sum / method.score_count
            method.after_update(time, torch.tensor(1.0))
        assert distance(method.center, 0.7 * start + 0.3 * scores) < CLOSE
        centers.append(method.center)
    assert distance(centers[0], centers[1]) < CLOSE


@pytest.mark.parametrize(
    ("samples", "prototypes", "temperature", "momentum"),
    [
        (10, 1024, 0.04, 0.99),
        (20_000, 1024, 0.04, 0.99),
        (20_001, 4096, 0.04, 0.99),
        (100_001, 16384, 0.05, 0.994),
        (500_001, 65536, 0.07, 0.996),
        (1_281_167, 65536, 0.07, 0.996),
    ],
)
def test_auto_goes_by_the_number_of_images(samples: int, prototypes: int, temperature: float, momentum: float) -> None:
    settled = DinoConfig().settled(samples)
    assert (settled.prototypes, settled.teacher_temperature, settled.momentum) == (prototypes, temperature, momentum)


def test_numbers_that_were_given_are_kept() -> None:
    config = DinoConfig(prototypes=77, teacher_temperature=0.03, momentum=0.5)
    assert config.settled(10) == config
    assert DinoConfig(momentum=0.5).settled(10**6).prototypes == 65536


def test_the_teacher_is_at_rest_where_the_student_drops() -> None:
    method = build_dino(VIT.model_copy(update={"dropout": 0.3, "attention_dropout": 0.3, "drop_path": 0.3}))
    method.train()
    first, second = (method(batch_of(), TIMELINE.clock(0)).features for _ in range(2))
    assert not torch.equal(first["student"], second["student"])
    assert torch.equal(first["teacher"], second["teacher"])


def test_teacher_with_batch_norm_sees_statistics_of_its_own() -> None:
    torch.manual_seed(0)
    method = dino_config().build(TimmConfig(name="resnet18", stem="small"), FACTS)
    method.prepare(lambda: pytest.fail("a ResNet needs no images to start"))
    teacher, student = method.get_submodule("backbone.network"), method.get_submodule("student.network")
    stem = copy.deepcopy(teacher.get_submodule("conv1"))
    state, batch = state_of(method), batch_of(dtype=torch.float32)
    assert train_step(state, batch, plan_for(method)).applied == 1
    for moving in ("conv1.weight", "layer4.1.bn2.weight"):
        assert not torch.equal(student.get_parameter(moving), teacher.get_parameter(moving))

    images = torch.cat([batch.views["global_1"][0], batch.views["global_2"][0]])
    mean, own = teacher.get_buffer("bn1.running_mean"), student.get_buffer("bn1.running_mean")
    # From zero, a tenth of the way to the mean of both large views at once; float32 sums in another order.
    torch.testing.assert_close(mean, 0.1 * stem(images).mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(mean, own, rtol=1e-2)
    assert teacher.get_buffer("bn1.num_batches_tracked") == 1
    assert student.get_buffer("bn1.num_batches_tracked") == 2  # the large views, then the small ones
    # Statistics of the batch, not the running ones, normalise: the output does not change with them.
    first = method.backbone.pool(images)
    mean += 1
    assert torch.equal(method.backbone.pool(images), first)
