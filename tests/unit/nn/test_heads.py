"""The linear classifier."""

import torch

from opsin.nn.heads import Classifier


def test_scores_are_a_scaled_linear_map() -> None:
    head = Classifier(8, 3, scale=0.5)
    pooled = torch.randn(4, 8)
    expected = 0.5 * (pooled @ head.linear.weight.T + head.linear.bias)
    torch.testing.assert_close(head(pooled), expected)


def test_starts_small_and_without_preference() -> None:
    head = Classifier(512, 100)
    assert head.linear.bias.abs().max() == 0.0
    assert 0.019 < head.linear.weight.std() < 0.021  # 51,200 draws: known to 0.3 %
    assert Classifier(8, 3, bias=False).linear.bias is None


def test_dropout_acts_in_training_only() -> None:
    head = Classifier(64, 3, dropout=0.5)
    pooled = torch.ones(1, 64)
    assert not torch.equal(head(pooled), head(pooled))
    head.eval()
    assert torch.equal(head(pooled), head(pooled))
