"""A GPU is never waited for, and has few kernels to start: seen on a device without values, which needs no GPU."""

from collections.abc import Sequence

import pytest
from torch import Tensor
from torch.nn import functional

from opsin.training.step import train_step
from tests.meta_device import allow_meta, training_of, watched

SHALLOW = ("model.depth=2",)
SMALL_JEPA = (*SHALLOW, "method.predictor_depth=2")

# The recipe and what is changed for the sake of time. Adam replaces Muon, whose kernels have a test of their own.
KINDS: dict[str, tuple[str, Sequence[str]]] = {
    "supervised": ("cifar10-vit-strong", SHALLOW),
    "supervised, mixed and erased": ("cifar10-standard", ("method.views.cutout_px=4",)),
    "dino": ("dino-imagenet-vits16", (*SHALLOW, "method.prototypes=4096")),
    "dino of a convolutional network": ("dino-cifar10", ()),
    "ijepa": ("ijepa-cifar10", SMALL_JEPA),
    "hjepa": ("hjepa-cifar10", SMALL_JEPA),
}


@pytest.mark.parametrize("resident", [False, True], ids=["read", "resident"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_and_step_never_wait_for_the_device(kind: str, resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_meta(monkeypatch)
    name, changes = KINDS[kind]
    training = training_of(name, *changes, batch_size=4, resident=resident)
    training.data.load()
    with watched(monkeypatch) as seen:
        (batch,) = training.data.batches(0, 1)
        train_step(training.state, batch, training.plan)
    assert not seen.waits
    assert not seen.mixed


@pytest.mark.parametrize(("changes", "masked"), [((), True), (("method.masks.parity=published",), False)])
def test_attention_gets_a_mask_only_where_blocks_are_padded(
    changes: tuple[str, ...], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask, a GPU computes attention by a slower kernel."""
    allow_meta(monkeypatch)
    training = training_of("ijepa-cifar10", *SMALL_JEPA, *changes, batch_size=4, resident=True)
    masks: list[bool] = []
    attention = functional.scaled_dot_product_attention

    def watched_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, dropout_p: float) -> Tensor:
        masks.append(attn_mask is not None)
        return attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched_attention)
    with watched(monkeypatch):
        (batch,) = training.data.batches(0, 1)
        train_step(training.state, batch, training.plan)
    assert len(masks) == 6, "teacher, student and predictor with two blocks each"
    assert any(masks) == masked


# Kernels of a batch and its update, at the true size of the network. Counted on a GPU that computes nothing, in the
# number format of such a GPU, it is more: docs/RESULTS.md.
BUDGETS = {
    "dino-imagenet-vits16": 2_200,
    "imagenet-resnet50": 700,
    "hjepa-cifar10": 3_500,
}


@pytest.mark.parametrize("name", BUDGETS)
def test_few_kernels_make_a_batch_and_its_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_meta(monkeypatch)
    # Sixteen images: some are blurred, some are not.
    training = training_of(name, batch_size=16, resident=False)
    with watched(monkeypatch) as seen:
        (batch,) = training.data.batches(0, 1)
        train_step(training.state, batch, training.plan)  # the first update also makes the state of the optimizer
        seen.kernels.clear()
        (batch,) = training.data.batches(1, 2)
        views = seen.total
        train_step(training.state, batch, training.plan)
    assert seen.total <= BUDGETS[name], f"{views} for the views; the most: {seen.kernels.most_common(12)}"
