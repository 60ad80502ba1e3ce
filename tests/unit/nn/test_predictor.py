"""The predictor of the JEPAs against plain torch, and what padding must not do."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opsin.nn.attention import AttentionKind, set_attention
from opsin.nn.predictor import Predictor
from tests.plain_ijepa import PlainPredictor

SIZES: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2}
# float64: the same sums in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def predictor() -> Predictor:
    """In float64, with no parameter at 0 or 1."""
    torch.manual_seed(0)
    predictor = Predictor(12, **SIZES).double()
    with torch.no_grad():
        for param in predictor.parameters():
            param.add_(torch.randn_like(param), alpha=0.3)
    return predictor


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Four contexts of five tokens; six queries, some of them padding."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"tokens": (4, 5, 12), "positions": (4, 5, 8), "queries": (4, 6, 8)}
    found = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    return {**found, "valid": torch.arange(6) < torch.tensor([6, 4, 1, 3])[:, None]}


def plain_copy(predictor: Predictor) -> PlainPredictor:
    plain = PlainPredictor(12, **SIZES).double()
    for own, param in zip(plain.parameters(), predictor.parameters(), strict=True):
        assert own.shape == param.shape
        own.data.copy_(param)
    return plain


@pytest.mark.parametrize("kind", ["fused", "explicit"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_plain_pytorch(
    predictor: Predictor, inputs: dict[str, Tensor], kind: AttentionKind, padded: bool
) -> None:
    set_attention(predictor, kind)
    plain = plain_copy(predictor)
    valid = inputs["valid"] if padded else None
    found = predictor(inputs["tokens"], inputs["positions"], inputs["queries"], valid)
    expected = plain(inputs["tokens"], inputs["positions"], inputs["queries"], valid)
    assert found.shape == (4, 6, 12)
    torch.testing.assert_close(found, expected, **CLOSE)
    for out in (found, expected):
        out.square().sum().backward()
    for (name, param), own in zip(predictor.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param.grad, own.grad, **CLOSE, msg=name)


@pytest.mark.parametrize("kind", ["fused", "explicit"])
def test_padding_changes_no_other_prediction(
    predictor: Predictor, inputs: dict[str, Tensor], kind: AttentionKind
) -> None:
    set_attention(predictor, kind)
    valid = inputs["valid"]
    before = predictor(**inputs)
    changed = inputs["queries"].where(valid[..., None], 1000.0)
    after = predictor(**{**inputs, "queries": changed})
    assert torch.equal(before[valid], after[valid])
    assert not torch.equal(before[~valid], after[~valid])
    # Without padding at all: each sum has fewer terms.
    for image, count in enumerate(valid.sum(1).tolist()):
        alone = predictor(
            *(inputs[name][image, None] for name in ("tokens", "positions")), inputs["queries"][image, None, :count]
        )
        torch.testing.assert_close(alone[0], before[image, :count], **CLOSE)


def test_what_is_valid_is_seen_by_the_others(predictor: Predictor, inputs: dict[str, Tensor]) -> None:
    changed = inputs["queries"].clone()
    changed[:, 0] = -changed[:, 0]
    before, after = predictor(**inputs), predictor(**{**inputs, "queries": changed})
    assert (before[0, 1:] != after[0, 1:]).any(-1).all()


def test_predictions_go_with_their_queries(predictor: Predictor, inputs: dict[str, Tensor]) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = {**inputs, "queries": inputs["queries"][:, order], "valid": inputs["valid"][:, order]}
    torch.testing.assert_close(predictor(**turned), predictor(**inputs)[:, order], **CLOSE)


def test_blocks_of_an_image_have_its_context_each_on_its_own(predictor: Predictor, inputs: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(8, 6, 8, generator=generator, dtype=torch.float64)
    valid = torch.arange(6) < torch.tensor([6, 4, 1, 3, 6, 6, 2, 5])[:, None]
    together = predictor(inputs["tokens"], inputs["positions"], queries, valid)
    for block in range(2):
        own = slice(block, None, 2)
        alone = predictor(inputs["tokens"], inputs["positions"], queries[own], valid[own])
        torch.testing.assert_close(together[own][valid[own]], alone[valid[own]], **CLOSE)


def test_starts_as_published() -> None:
    torch.manual_seed(0)
    predictor = Predictor(192, width=96, depth=2, heads=3)
    for name, param in predictor.named_parameters():
        if "norm" in name:
            assert torch.equal(param, torch.full_like(param, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not param.any(), name
        else:
            # The deviation of n draws is known to 1 / sqrt(2 n); six times that never fails by chance. Depth has no
            # influence: every block starts alike.
            assert param.std().item() == pytest.approx(0.02, rel=6 / math.sqrt(2 * param.numel())), name
    assert predictor.mask_token.shape == (1, 1, 96)


def test_predicts_in_bfloat16(predictor: Predictor, inputs: dict[str, Tensor]) -> None:
    predictor.float()
    inputs = {name: value if value.dtype == torch.bool else value.float() for name, value in inputs.items()}
    exact = predictor(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predictor(**inputs)
    # bfloat16 has three digits, and errors add up over the layers.
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.1)
