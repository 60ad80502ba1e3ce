"""Attention against a plain loop, and the choice of its kernel."""

import math

import pytest
import torch
from torch import Tensor

from opsin.nn.attention import Attention, AttentionKind, choose_attention, set_attention


def plain(layer: Attention, x: Tensor) -> Tensor:
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
                scores = torch.stack([q[token] @ key / math.sqrt(size) for key in k])
                mixed[image, token, at] = scores.softmax(0) @ v
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
