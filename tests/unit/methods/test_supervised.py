"""Supervised classification equals cross-entropy written out, and its views are those that the settings ask for."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch, Blend, DataFacts
from opsin.data.views.colour import ColorJitter, Cutout, Grayscale, RandomErasing
from opsin.data.views.crops import CenterCrop, PadCrop, RandomResizedCrop
from opsin.data.views.randaugment import RandAugment
from opsin.errors import ConfigError
from opsin.methods.supervised import Supervised, SupervisedConfig, SupervisedViews
from opsin.nn.convnet import ConvNetConfig
from opsin.nn.vit import ViTConfig

VIT = ViTConfig(width=16, depth=1, heads=2, patch=4)
CLOCK = Timeline([Stage(epochs=1, batch_size=5, steps_per_epoch=10)]).clock(0)


def facts(*classes: str) -> DataFacts:
    return DataFacts(classes, samples=64, image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


def build(**settings: object) -> Supervised:
    torch.manual_seed(0)
    return SupervisedConfig.model_validate(settings).build(VIT, facts("cat", "dog", "horse"))


def batch_of(size: int = 5) -> Batch:
    images = torch.randn(1, size, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Batch({"image": images}, torch.arange(size) % 3, torch.arange(size))


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    """The definition, one image after the other: the label gets 1 - s, and every class s / K."""
    total = 0.0
    for scores, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        logarithms = torch.tensor(scores).double().log_softmax(0).tolist()
        share = smoothing / len(scores)
        targets = [share + (1 - smoothing if k == label else 0) for k in range(len(scores))]
        total -= sum(target * logarithm for target, logarithm in zip(targets, logarithms, strict=True))
    return total / len(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_with_label_smoothing(smoothing: float) -> None:
    method, batch = build(label_smoothing=smoothing), batch_of()
    losses = method(batch, CLOCK)
    logits = method.logits(batch.views["image"][0])
    # Float32 against float64: about 1e-7 of a loss around 1.
    assert losses.total.item() == pytest.approx(smoothed_cross_entropy(logits, batch.labels, smoothing), rel=1e-5)
    right = [scores.argmax().item() == label for scores, label in zip(logits, batch.labels.tolist(), strict=True)]
    assert losses.measures["top1"].item() == pytest.approx(sum(right) / len(right))


def test_class_scores_are_the_head_on_the_pooled_features() -> None:
    method, images = build(head_scale=2.0, head_bias=False), batch_of().views["image"][0]
    features = method.encode(images).pooled
    torch.testing.assert_close(method.logits(images), 2.0 * features @ method.head.linear.weight.T)


def test_dropout_before_the_classifier_rests_in_evaluation() -> None:
    method, images = build(head_dropout=0.5), batch_of().views["image"][0]
    assert not torch.equal(method.logits(images), method.logits(images))
    method.eval()
    assert torch.equal(method.logits(images), method.logits(images))


def test_the_head_learns_at_its_own_rate() -> None:
    groups = build(head_lr_factor=0.1).param_groups()
    assert {group.name: group.lr_factor for group in groups if group.name.startswith("head.")} == {
        "head.decay": 0.1,
        "head.no_decay": 0.1,
    }
    assert all(group.lr_factor == 1.0 for group in groups if group.name.startswith("backbone."))


@pytest.mark.parametrize(
    ("settings", "crop"),
    [
        (
            {"crop": "padded", "padding_px": 3, "padding": "reflect", "flip": "alternate"},
            PadCrop(size=16, padding_px=3, padding="reflect", flip="alternate"),
        ),
        (
            {"crop": "resized", "scale": (0.2, 0.9), "ratio": (0.5, 2.0), "interpolation": "bicubic"},
            RandomResizedCrop(size=16, scale=(0.2, 0.9), ratio=(0.5, 2.0), interpolation="bicubic"),
        ),
        ({"crop": "center", "flip": "none"}, CenterCrop(size=16, resize=16, flip="none")),
    ],
    ids=["padded", "resized", "center"],
)
def test_the_crop_is_the_one_asked_for(settings: dict[str, object], crop: object) -> None:
    views = build(views=settings).views(16)
    assert views.crops == {"image": crop}
    assert views.masks is None


def test_only_the_colour_operations_asked_for_are_done() -> None:
    assert SupervisedViews().build(16).augment == {"image": []}
    everything = SupervisedViews(randaugment_ops=2, brightness=0.4, hue=0.1, grayscale=0.2, erasing=0.25, cutout_px=4)
    operations = everything.build(16).augment["image"]
    assert [type(operation) for operation in operations] == [RandAugment, ColorJitter, Grayscale, RandomErasing, Cutout]


def test_images_without_labels_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"these images have no labels, .* into a folder of its own"):
        SupervisedConfig().build(VIT, facts())


def test_a_single_class_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'cat' is the only class; .* at least two folders"):
        SupervisedConfig().build(VIT, facts("cat"))


def test_a_backbone_that_starts_from_data_gets_the_images_of_the_first_batch() -> None:
    torch.manual_seed(0)
    method = SupervisedConfig().build(ConvNetConfig(widths=(4, 4, 4)), facts("cat", "dog"))
    before = [value.clone() for value in method.backbone.state_dict().values()]
    method.prepare(lambda: batch_of(64))
    changed = [not torch.equal(a, b) for a, b in zip(method.backbone.state_dict().values(), before, strict=True)]
    assert changed[0]
    assert sum(changed) == 1


def test_the_loss_of_mixed_images_is_cross_entropy_against_both_labels() -> None:
    method, batch = build(label_smoothing=0.1, mix={"mixup": 0.2, "label_smoothing": 0.05}), batch_of()
    blend = Blend(torch.tensor([1, 1, 0, 2, 2]), torch.tensor([0.9, 0.3, 0.5, 1.0, 0.0]))
    mixed = Batch(batch.views, batch.labels, batch.ids, blend=blend)
    logits = method.logits(batch.views["image"][0]).double()
    targets = torch.zeros(5, 3, dtype=torch.float64)
    for image, (own, other, share) in enumerate(
        zip(batch.labels.tolist(), blend.labels.tolist(), blend.shares.tolist(), strict=True)
    ):
        targets[image, own] += share
        targets[image, other] += 1 - share
    expected = F.cross_entropy(logits, targets, label_smoothing=0.05)
    losses = method(mixed, CLOCK)
    # Float32 against float64: about 1e-7 of a loss around 1.
    assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5)
    main = torch.tensor([0, 1, 2, 0, 2])
    assert losses.measures["top1"].item() == pytest.approx((logits.argmax(1) == main).float().mean().item())
    whole = method(batch, CLOCK).total.item()
    assert whole == pytest.approx(smoothed_cross_entropy(logits, batch.labels, 0.1), rel=1e-5)


def test_a_stage_may_have_a_label_smoothing_of_its_own() -> None:
    method, batch = build(label_smoothing=0.3), batch_of()
    clock = Timeline([Stage(epochs=1, batch_size=5, steps_per_epoch=10, label_smoothing=0.1)]).clock(0)
    logits = method.logits(batch.views["image"][0])
    assert method(batch, clock).total.item() == pytest.approx(
        smoothed_cross_entropy(logits, batch.labels, 0.1), rel=1e-5
    )


def test_parts_of_a_mixed_batch_keep_their_own_second_labels() -> None:
    method, batch = build(mix={"mixup": 0.2}), batch_of(6)
    blend = Blend(torch.tensor([1, 1, 0, 2, 2, 0]), torch.tensor([0.9, 0.3, 0.5, 1.0, 0.0, 0.7]))
    whole = Batch(batch.views, batch.labels, batch.ids, blend=blend)
    losses = [method(part, CLOCK).total.item() * len(part) for part in whole.pieces(4)]
    # Sums of fp32 in another order.
    assert sum(losses) / 6 == pytest.approx(method(whole, CLOCK).total.item(), rel=1e-5)


def test_images_of_which_some_have_no_label_are_refused_with_their_number() -> None:
    some = replace(facts("cat", "dog"), unlabelled=3)
    with pytest.raises(ConfigError, match=r"3 of the 64 training images have no label, .*; label them, or take them"):
        SupervisedConfig().build(VIT, some)
