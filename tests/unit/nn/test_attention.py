"""Attention against a plain loop, and the choice of its kernel."""

import math

import pytest
import torch
from torch import Tensor

from opsin.nn.attention import Attention, AttentionKind, choose_attention, set_attention


def plain(layer: Attention, x: Tensor, seen: Tensor | None = None) -> Tensor:
    """The definition, one image, head and token at a time, in float64."""
    layer, x = layer.double(), x.double()
    width, size = x.shape[-1], x.shape[-1] // layer.heads
    qkv = layer.qkv(x)
    mixed = torch.zeros_like(x)
    for image in range(len(x)):
        for head in range(layer.heads):
            at = slice(head * size, (head + 1) * size)
            q, k, v = (qkv[image, :, part * width :][:, at] for part in range(3))
            for token in range(x.shape[1]):
                others = [i for i in range(x.shape[1]) if seen is None or seen[image, i]]
                scores = torch.stack([q[token] @ k[other] / math.sqrt(size) for other in others])
                mixed[image, token, at] = scores.softmax(0) @ v[others]
    projected: Tensor = layer.proj(mixed)
    return projected


@pytest.mark.parametrize("kind", ["fused", "explicit"])
@pytest.mark.parametrize("queries", [None, 1, 3])
def test_equals_the_definition(kind: AttentionKind, queries: int | None) -> None:
    torch.manual_seed(0)
    layer, x = Attention(12, 3), torch.randn(2, 5, 12)
    set_attention(layer, kind)
    out = layer(x, queries)
    # float32 against float64: seven digits.
    torch.testing.assert_close(out, plain(layer, x)[:, :queries].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fused", "explicit"])
@pytest.mark.parametrize("queries", [None, 1, 3])
def test_nobody_looks_at_what_is_not_seen(kind: AttentionKind, queries: int | None) -> None:
    torch.manual_seed(0)
    layer, x = Attention(12, 3), torch.randn(3, 5, 12)
    seen = torch.tensor([[True, True, False, True, False], [False, True, True, True, True], [True] * 5])
    set_attention(layer, kind)
    out = layer(x, queries, seen)
    # Bit for bit: the values that are not seen have a share of exactly 0.
    changed = x.where(seen[..., None], 100.0)
    asked = seen[:, :queries]
    assert torch.equal(layer(changed, queries, seen)[asked], out[asked])
    # float32 against float64: seven digits.
    torch.testing.assert_close(out, plain(layer, x, seen)[:, :queries].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fused", "explicit"])
def test_what_is_not_seen_gets_no_gradient(kind: AttentionKind) -> None:
    torch.manual_seed(0)
    layer, x = Attention(12, 3), torch.randn(2, 5, 12, requires_grad=True)
    set_attention(layer, kind)
    seen = torch.tensor([[True, True, False, True, False], [True] * 5])
    layer(x, None, seen)[seen].square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad.any(-1), seen)


def test_set_attention_counts_the_layers_it_set() -> None:
    layers = torch.nn.ModuleList([Attention(4, 1), torch.nn.Linear(4, 4), Attention(4, 2)])
    assert set_attention(layers, "explicit") == 2
    assert [layer.fused_attn for layer in layers if isinstance(layer, Attention)] == [False, False]
    assert set_attention(torch.nn.Linear(4, 4), "fused") == 0


def test_choice_follows_the_device_and_says_why() -> None:
    assert choose_attention(torch.device("cuda"), "bf16")[0] == "fused"
    kind, reason = choose_attention(torch.device("cpu"), "bf16")
    assert kind == "explicit"
    assert "bf16" in reason
