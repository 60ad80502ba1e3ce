"""k-NN agrees with scikit-learn and with a plain loop."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from opsin.evaluation import knn
from opsin.evaluation.features import Features, count_hits
from opsin.evaluation.knn import count_votes, neighbours, score_neighbours
from tests.unit.evaluation.digits import Pixels, RandomFeatures, digits_features

NETWORKS = {"pixels": Pixels, "random": RandomFeatures}


@pytest.mark.parametrize("network", NETWORKS)
def test_predictions_equal_those_of_scikit_learn(network: str) -> None:
    pair = digits_features(NETWORKS[network]())
    theirs = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(pair.bank.values.double(), pair.bank.labels)
    cosines, indices = neighbours(F.normalize(pair.queries.values), F.normalize(pair.bank.values), 20)
    votes = count_votes(cosines, pair.bank.labels[indices], 10, 0.07)
    expected = torch.from_numpy(theirs.predict(pair.queries.values.double()))
    shares = theirs.predict_proba(pair.queries.values.double())
    # float32 cosines off by 1e-7, over 0.07, in 20 summands.
    np.testing.assert_allclose(votes / votes.sum(1, keepdim=True), shares, atol=1e-4)
    assert torch.equal(votes.argmax(1), expected)
    hits = score_neighbours(pair.bank, pair.queries)
    assert hits.images == 359
    assert hits.right[1] == int((expected == pair.queries.labels).sum())


def test_votes_equal_those_of_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(50, 5, generator=generator, dtype=torch.float64))
    queries = F.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64))
    labels = torch.randint(4, (50,), generator=generator)
    cosines, indices = neighbours(queries.float(), bank.float(), 9)
    votes = count_votes(cosines, labels[indices], 4, 0.07)
    for query, found in zip(queries, votes, strict=True):
        order = sorted(range(50), key=lambda n: -float(query @ bank[n]))[:9]
        sums = [0.0] * 4
        for n in order:
            sums[int(labels[n])] += math.exp(float(query @ bank[n]) / 0.07)
        scale = math.exp(float(query @ bank[order[0]]) / 0.07)
        torch.testing.assert_close(found.double(), torch.tensor(sums).double() / scale, rtol=1e-4, atol=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = digits_features(RandomFeatures())
    whole = score_neighbours(pair.bank, pair.queries)
    monkeypatch.setattr(knn, "_QUERY_CHUNK", 50)
    monkeypatch.setattr(knn, "_BANK_CHUNK", 13)
    assert score_neighbours(pair.bank, pair.queries) == whole


@pytest.mark.parametrize("chunk", [7, 16384])
def test_of_equally_near_images_the_first_count(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a bank may be equal: a plain stable sort says which of them vote."""
    monkeypatch.setattr(knn, "_BANK_CHUNK", chunk)
    bank = torch.eye(4)[torch.randint(4, (60,), generator=torch.Generator().manual_seed(0))]
    queries = torch.cat([torch.eye(4), torch.full((1, 4), 0.5), torch.zeros(1, 4)])
    for k in (1, 5, 20, 60):
        cosines, indices = neighbours(queries, bank, k)
        order = (queries @ bank.T).sort(dim=1, descending=True, stable=True)
        assert torch.equal(indices, order.indices[:, :k])
        assert torch.equal(cosines, order.values[:, :k])


def test_features_that_are_not_finite_have_neighbours_all_the_same() -> None:
    bank = torch.full((30, 4), 0.5)
    bank[3] = math.nan
    queries = torch.stack([torch.full((4,), 0.5), torch.full((4,), math.nan)])
    _, indices = neighbours(queries, bank, 5)
    assert sorted(indices[0].tolist()) == [0, 1, 2, 3, 4]
    assert indices.shape == (2, 5)


def test_one_neighbour_is_the_nearest_and_finds_itself() -> None:
    bank = digits_features(Pixels()).bank
    assert score_neighbours(bank, bank, k=1).right[1] == len(bank.labels)


def test_more_neighbours_than_images_are_all_of_them() -> None:
    bank = Features(torch.eye(3), torch.tensor([0, 1, 1]), 2)
    assert score_neighbours(bank, Features(torch.eye(3), torch.tensor([1, 1, 1]), 2), k=20).right == {1: 2}


def test_a_small_temperature_does_not_overflow() -> None:
    pair = digits_features(Pixels())
    cold = score_neighbours(pair.bank, pair.queries, k=20, temperature=1e-4)
    nearest = score_neighbours(pair.bank, pair.queries, k=1)
    assert abs(cold.right[1] - nearest.right[1]) <= 1


def test_a_class_without_a_vote_is_no_answer() -> None:
    bank = Features(torch.eye(6)[:2], torch.tensor([0, 0]), 6)
    hits = score_neighbours(bank, Features(torch.eye(6)[:1].repeat(6, 1), torch.arange(6), 6))
    assert hits.right == {1: 1, 5: 1}


def test_the_length_of_a_feature_does_not_count() -> None:
    pair = digits_features(RandomFeatures())
    factors = torch.linspace(0.5, 20, len(pair.bank.labels))[:, None]
    scaled = Features(pair.bank.values * factors, pair.bank.labels, 10)
    difference = score_neighbours(scaled, pair.queries).right[1] - score_neighbours(pair.bank, pair.queries).right[1]
    assert abs(difference) <= 1  # rounding may turn a tie


def test_votes_go_by_the_highest_sum() -> None:
    votes = count_votes(torch.tensor([[1.0, 0.99, 0.98]]), torch.tensor([[2, 0, 0]]), 3, 0.07)
    assert votes.argmax(1).tolist() == [0]
    assert count_hits(votes, torch.tensor([0])).tolist() == [1]
