"""Features are those of the network at rest, and looking changes nothing."""

import contextlib
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from opsin.evaluation.features import Features, FeatureScore, Hits, Score, count_hits, extract
from opsin.evaluation.knn import KnnConfig, score_neighbours
from opsin.evaluation.linear import LinearConfig, score_linear
from opsin.methods.supervised import SupervisedConfig
from opsin.nn.vit import ViTConfig
from tests.story import Record
from tests.unit.evaluation.digits import (
    CPU,
    Counted,
    Pixels,
    RandomFeatures,
    digits_context,
    digits_labelled,
    feature_score,
)

SCORES: dict[str, Score] = {"knn": score_neighbours, "linear": partial(score_linear, decays=(1e-2, 1e-3))}


def test_features_are_those_of_the_network_at_rest() -> None:
    network, data = RandomFeatures(), digits_labelled().queries
    features = extract(network, data, autocast=contextlib.nullcontext, device=CPU, batch_size=100)
    (batch,) = data.batches(1000)
    with torch.no_grad():
        expected = network.eval().encode(batch.views["image"][0]).pooled
    # Products of other sizes are summed in another order.
    torch.testing.assert_close(features.values, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(features.labels, batch.labels)
    assert features.values.dtype == torch.float32
    assert not features.values.requires_grad


def test_features_under_autocast_are_kept_in_float32() -> None:
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    features = extract(RandomFeatures(), digits_labelled().queries, autocast=autocast, device=CPU)
    assert features.values.dtype == torch.float32


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_the_same_each_time_and_leaves_all_as_it_was(name: str) -> None:
    network, evaluator = RandomFeatures(), feature_score(SCORES[name])
    network.norm.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    first = evaluator.evaluate(network)
    assert torch.equal(torch.rand(4), expected)
    assert (network.training, network.norm.training, network.drop.training) == (True, False, True)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.weight.grad is None
    torch.manual_seed(6)
    assert evaluator.evaluate(network) == first
    assert set(first) == {"top1", "top5"}
    assert feature_score(SCORES[name]).evaluate(network) == first


@pytest.mark.parametrize("name", SCORES)
def test_a_collapsed_or_broken_network_has_a_bad_score_and_no_fault(name: str) -> None:
    for value in (0.0, 1.0, math.nan, math.inf):
        network = RandomFeatures()
        network.norm.eval()
        with torch.no_grad():
            network.weight.fill_(value)
        assert feature_score(SCORES[name]).evaluate(network)["top1"] < 0.3


@pytest.mark.parametrize("name", SCORES)
def test_without_time_it_goes_on_with_fewer_images_and_tells_how_many(name: str) -> None:
    values = feature_score(SCORES[name], seconds=1e-6, batch_size=100).evaluate(Pixels())
    assert (values["bank"], values["queries"]) == (100, 100)
    # A stratified hundred of 8 x 8 digits: far above chance.
    assert values["top1"] > 0.5 or name == "linear"
    assert ("cut" in values) == (name == "linear")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_without_memory_it_goes_on_with_half_of_the_images_and_says_so(tmp_path: Path, error: Exception) -> None:
    def cramped(bank: Features, queries: Features, until_s: float) -> Hits:
        if len(bank.labels) > 400:
            raise error
        return score_neighbours(bank, queries, until_s)

    record = Record()
    context = replace(digits_context(tmp_path), teller=record)
    evaluator = FeatureScore(KnnConfig(), context, "knn", title="k-NN", score=cramped)
    values = evaluator.evaluate(Pixels())
    assert (values["bank"], values["queries"]) == (360, 90)
    assert values["top1"] > 0.8, "every beginning of the images has all classes"
    assert record.warnings == [
        "k-NN: out of memory with features of 1,797 images: from here on it scores 180 and learns from 719",
        "k-NN: out of memory with features of 899 images: from here on it scores 90 and learns from 360",
    ]
    assert evaluator.evaluate(Pixels()) == values
    assert len(record.warnings) == 2
    hopeless = FeatureScore(KnnConfig(), context, "knn", title="k-NN", score=partial(cramped_always, error=error))
    with pytest.raises(type(error)):
        hopeless.evaluate(Pixels())


def cramped_always(bank: Features, queries: Features, until_s: float, *, error: Exception) -> Hits:
    raise error


def test_enough_time_changes_nothing() -> None:
    assert feature_score(score_neighbours, seconds=600).evaluate(Pixels()) == feature_score(score_neighbours).evaluate(
        Pixels()
    )


def test_time_that_ends_between_batches_leaves_a_beginning() -> None:
    data = digits_labelled().bank
    whole = extract(Pixels(), data, autocast=contextlib.nullcontext, device=CPU, batch_size=64)
    part = extract(
        Pixels(), data, autocast=contextlib.nullcontext, device=CPU, batch_size=64, until_s=time.perf_counter() + 0.005
    )
    assert len(part.labels) % 64 == 0 or len(part.labels) == len(whole.labels)
    assert torch.equal(part.values, whole.values[: len(part.labels)])
    assert torch.equal(part.labels, whole.labels[: len(part.labels)])


DIGITS = 1797


def test_scores_of_the_same_weights_share_their_features(tmp_path: Path) -> None:
    network, context = Counted(), digits_context(tmp_path)
    knn, linear = KnnConfig().build(context, "knn"), LinearConfig().build(context, "linear")
    apart = [score.evaluate(network) for score in (knn, linear)]
    assert network.images == 2 * DIGITS, "nobody said that the weights are the same"
    network.images = 0
    with context.features.weights_unchanged():
        together = [score.evaluate(network) for score in (knn, linear)]
    assert network.images == DIGITS
    assert together == apart


def test_features_of_other_weights_are_never_shared(tmp_path: Path) -> None:
    network, context = Counted(), digits_context(tmp_path)
    knn, linear = KnnConfig().build(context, "knn"), LinearConfig().build(context, "linear")
    with context.features.weights_unchanged():
        knn.evaluate(network)
    with torch.no_grad():
        network.weight[:, 5:] = 0
    expected = LinearConfig().build(digits_context(tmp_path), "linear").evaluate(network)
    network.images = 0
    with context.features.weights_unchanged():
        assert linear.evaluate(network) == expected
        assert network.images == DIGITS
        other = Counted()
        linear.evaluate(other)
        assert other.images == DIGITS, "another network at the same time"
    assert context.features.kept is None


@pytest.mark.parametrize("changed", [{"bank_images": 900}, {"batch_size": 100}, {"path": "digits"}])
def test_features_that_were_asked_for_otherwise_are_not_shared(changed: dict[str, object], tmp_path: Path) -> None:
    network, context = Counted(), digits_context(tmp_path)
    knn = KnnConfig().build(context, "knn")
    linear = LinearConfig.model_validate({"iterations": 20, **changed}).build(context, "linear")
    with context.features.weights_unchanged():
        knn.evaluate(network)
        network.images = 0
        linear.evaluate(network)
    assert network.images == (900 + 359 if "bank_images" in changed else DIGITS)


def test_features_of_other_blocks_are_not_shared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    context = digits_context(tmp_path)
    assert context.validation is not None
    method = SupervisedConfig().build(ViTConfig(width=16, depth=2, heads=2, patch=4), context.validation.facts)
    scores = [KnnConfig(blocks=blocks).build(context, "knn") for blocks in (1, 2)]
    apart = [score.evaluate(method) for score in scores]
    with context.features.weights_unchanged():
        assert [score.evaluate(method) for score in scores] == apart
    assert apart[0] != apart[1], "else nothing is seen here"


def test_features_that_time_cut_short_are_shared_with_those_who_have_no_more_of_it(tmp_path: Path) -> None:
    network, context = Counted(), digits_context(tmp_path)
    hurried, as_hurried, patient = (
        KnnConfig(seconds=seconds, batch_size=100).build(context, "knn") for seconds in (1e-6, 1e-6, 600)
    )
    with context.features.weights_unchanged():
        first = hurried.evaluate(network)
        assert network.images == 200
        assert as_hurried.evaluate(network) == first
        assert network.images == 200
        assert "bank" not in patient.evaluate(network)
    assert network.images == 200 + DIGITS


def test_hits_are_counted_among_the_best_and_what_is_not_finite_is_no_answer() -> None:
    scores = torch.tensor(
        [
            [9.0, 1, 2, 3, 4, 5],  # right
            [1.0, 9, 2, 3, 4, 5],  # the sixth
            [2.0, 9, 1, 3, 4, 5],  # the fifth
            [math.nan] * 6,
            [-math.inf] * 6,
        ]
    )
    assert count_hits(scores, torch.tensor([0, 0, 0, 0, 0])).tolist() == [1, 2]
    assert count_hits(scores[:, :5], torch.tensor([0, 0, 0, 0, 0])).tolist() == [1]


@pytest.mark.parametrize("classes", [10, 100])
def test_of_equal_scores_the_first_classes_count_on_every_device(classes: int) -> None:
    labels = torch.tensor([0, 1, 4, 5, classes - 1, -1])
    assert count_hits(torch.zeros(6, classes), labels).tolist() == [1, 3]
    scores = torch.zeros(6, classes)
    scores[:, 2] = scores[:, 7] = 1
    # Best are 2, 7, 0, 1, 3.
    assert count_hits(scores, torch.tensor([7, 2, 0, 1, 3, 4])).tolist() == [1, 5]


def test_a_report_is_one_line_and_plain_values() -> None:
    report = feature_score(SCORES["linear"]).report(Pixels())
    (line,) = report.lines()
    top1, top5 = report.values["top1"], report.values["top5"]
    assert line == f"score top-1 {top1:.2%}  top-5 {top5:.2%}  (359 images, learned from 1,438)"
    assert report.as_dict() == {
        "top1": top1,
        "top5": top5,
        "decay": report.facts["decay"],
        "images": 359,
        "bank": 1438,
        "cut": False,
    }
