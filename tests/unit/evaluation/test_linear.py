"""The linear probe is as good as scikit-learn's logistic regression, and never looks at the queries."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from opsin.evaluation import linear
from opsin.evaluation.features import Features
from opsin.evaluation.linear import (
    LinearConfig,
    choose_decay,
    class_scores,
    fit_logistic,
    loss_and_gradient,
    score_linear,
    standardise,
)
from tests.unit.evaluation.digits import Pixels, RandomFeatures, digits_features

NETWORKS = {"pixels": Pixels, "random": RandomFeatures}
TENTH, REST = slice(143), slice(143, None)


def small_problem() -> Features:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(3, (60,), generator=generator)
    return Features(torch.randn(60, 4, generator=generator) + labels[:, None], labels, 3)


def test_features_that_are_standardised_chunk_by_chunk_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = digits_features(RandomFeatures())
    before = pair.bank.values.clone()
    whole = score_linear(pair.bank, pair.queries)
    monkeypatch.setattr(linear, "_COPIED_BYTES", 0)
    bank, _ = standardise(pair.bank, pair.queries)
    assert bank.values is pair.bank.values, "no copy"
    assert score_linear(pair.bank, pair.queries) == whole
    assert torch.equal(pair.bank.values, before), "another score may need them"


@pytest.mark.parametrize("network", NETWORKS)
def test_a_fit_equals_that_of_scikit_learn(network: str) -> None:
    pair = digits_features(NETWORKS[network]())
    bank, queries = standardise(pair.bank, pair.queries)
    decay = 1e-2
    theirs = LogisticRegression(C=1 / (len(bank.labels) * decay), max_iter=2000, tol=1e-6)
    theirs.fit(bank.values.double(), bank.labels)
    fit = fit_logistic(bank, decay=decay, iterations=1000, tolerance=1e-6)
    assert fit.is_complete
    # Both stop near the one minimum, float32 against float64.
    np.testing.assert_allclose(fit.weights[:-1].T, theirs.coef_, atol=0.02)
    expected = theirs.predict_proba(queries.values.double())
    np.testing.assert_allclose(class_scores(fit.weights, queries.values).softmax(1), expected, atol=0.01)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_score_is_within_a_point_of_scikit_learn(network: str) -> None:
    pair = digits_features(NETWORKS[network]())
    found = score_linear(pair.bank, pair.queries).right[1] / 359
    bank, queries = standardise(pair.bank, pair.queries)
    theirs = LogisticRegression(max_iter=2000).fit(bank.values, bank.labels)
    assert found > theirs.score(queries.values, queries.labels) - 0.01
    assert found > 0.9


def test_a_penalty_that_changes_nothing_is_not_chosen_by_roundings() -> None:
    """Features that say next to nothing: the losses differ by some 1e-6, and the strongest penalty is chosen."""
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(2))
    for size in (0.0, 1e-5, 3e-4, 1e-3):
        values = size * torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
        assert choose_decay(Features(values, labels, 3), [1e-3, 1e-1, 1e-2], iterations=50).decay == 1e-1


def test_the_gradient_is_that_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_problem()
    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(linear, "_SCORES_CHUNK", 21)  # seven images at a time
    loss, gradient = loss_and_gradient(weights, data, 0.3)
    free = weights.double().requires_grad_()
    scores = data.values.double() @ free[:-1] + free[-1]
    expected = cross_entropy(scores, data.labels) + 0.15 * free[:-1].square().sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert free.grad is not None
    torch.testing.assert_close(gradient.double(), free.grad, rtol=1e-5, atol=1e-6)


def test_features_are_standardised_by_the_bank_and_constant_ones_are_nothing() -> None:
    values = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1.0, 50.0]) + 7
    constant = torch.full((500, 1), 0.1)
    bank = Features(torch.cat([values, constant], 1), torch.zeros(500, dtype=torch.int64), 2)
    other = replace(bank, values=bank.values + 1)
    first, second = standardise(bank, other)
    # The first feature has two or three digits left beside its mean of 7.
    assert first.values[:, :3].mean(0).abs().max() < 0.01
    torch.testing.assert_close(first.values[:, :3].std(0), torch.ones(3), rtol=1e-2, atol=0)
    assert not first.values[:, 3].any()
    assert torch.equal(second.values[:, 3], torch.zeros(500))


def test_the_penalty_is_chosen_on_a_part_of_the_bank() -> None:
    pair = digits_features(RandomFeatures())
    bank, queries = standardise(pair.bank, pair.queries)
    decays = (1e-5, 1e-1, 1e-3)
    choice = choose_decay(bank, decays, iterations=50)
    assert choice.is_complete
    first, rest = (replace(bank, values=bank.values[part], labels=bank.labels[part]) for part in (TENTH, REST))
    fits = {decay: fit_logistic(rest, decay=decay).weights for decay in decays}
    losses = {decay: float(cross_entropy(class_scores(fits[decay], first.values), first.labels)) for decay in fits}
    assert choice.decay == min(losses, key=lambda decay: losses[decay]) == 1e-3
    # Queries of any labels lead to the same choice.
    shuffled = replace(queries, labels=queries.labels.flip(0))
    facts = [score_linear(bank, part, decays=decays, iterations=50).facts for part in (queries, shuffled)]
    assert facts[0] == facts[1] == {"decay": choice.decay}


def test_labels_that_are_chance_get_the_strongest_penalty() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = Features(torch.randn(2000, 20, generator=generator), torch.randint(2, (2000,), generator=generator), 2)
    assert choose_decay(bank, (1e-4, 10.0, 1e-2), iterations=50).decay == 10.0


def test_a_bank_of_a_few_images_is_enough() -> None:
    for count in (1, 2, 9, 10):
        part = Features(torch.eye(10)[:count], torch.arange(count) % 2, 2)
        assert score_linear(part, part, iterations=20).images == count


def test_time_that_is_up_ends_the_fit() -> None:
    data = small_problem()
    fit = fit_logistic(data, decay=1e-3, until_s=time.perf_counter())
    assert (fit.iterations, fit.is_complete) == (0, False)
    hits = score_linear(data, data, time.perf_counter())
    assert hits.is_cut
    assert hits.images == 60


def test_a_start_is_not_changed() -> None:
    start = torch.zeros(5, 3)
    fit_logistic(small_problem(), decay=1e-2, start=start)
    assert not start.any()


def test_decays_are_above_zero() -> None:
    for decays in ((), (0.1, 0.0)):
        with pytest.raises(ValueError, match="must be one or more numbers above 0"):
            LinearConfig(decays=decays)
