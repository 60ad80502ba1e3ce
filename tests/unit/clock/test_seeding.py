import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.clock.seeding import fold_in, permutation, seed_layers, uniform, uniforms


def test_a_draw_depends_on_its_address_alone() -> None:
    ids = torch.tensor([5, 9, 2**40 + 3])
    together = uniform(1, 2, ids, "crop", 4)
    assert together.shape == (3, 4)
    for row, sample in zip(together, ids, strict=True):
        assert torch.equal(uniform(1, 2, sample[None], "crop", 4)[0], row)
    assert torch.equal(uniform(1, 2, ids, "crop", 6)[:, :4], together)


def test_several_streams_at_once_are_those_drawn_one_by_one() -> None:
    ids, counts = torch.tensor([5, 9, 2**40 + 3]), {"crop": 4, "none": 0, "flip": 1, "mix": 7}
    together = uniforms(1, 2, ids, counts)
    assert list(together) == list(counts)
    for stream, count in counts.items():
        assert torch.equal(together[stream], uniform(1, 2, ids, stream, count))
    assert uniforms(1, 2, ids, {}) == {}


def test_every_part_of_the_address_matters() -> None:
    ids = torch.arange(64)
    first = uniform(1, 2, ids, "crop", 1)
    for other in (uniform(2, 2, ids, "crop", 1), uniform(1, 3, ids, "crop", 1), uniform(1, 2, ids, "flip", 1)):
        assert (first != other).float().mean() > 0.9


def test_draws_are_uniform_and_independent() -> None:
    draws = uniform(0, 0, torch.arange(20_000), "x", 8).numpy()
    assert draws.min() >= 0
    assert draws.max() < 1
    # 20,000 draws in 20 bins: chi-square with 19 degrees of freedom exceeds 55 once in 30,000 times.
    for column in draws.T:
        counts, _ = np.histogram(column, bins=20, range=(0, 1))
        assert ((counts - 1000) ** 2 / 1000).sum() < 55
    # The correlation of independent columns has deviation 1 / sqrt(20,000) = 0.007: five of them.
    correlation = np.corrcoef(draws.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.036
    neighbours = np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]
    assert abs(neighbours) < 0.036


def test_the_numbers_are_the_same_for_ever() -> None:
    # Stored values: a change here changes every run ever made from a recipe.
    assert fold_in(0, "order", 3) == 768012916988110333
    assert uniform(7, 1, torch.tensor([0, 123]), "crop", 2).tolist() == [
        [0.41888946294784546, 0.25085675716400146],
        [0.41890865564346313, 0.15992802381515503],
    ]
    assert permutation(3, 5, 8).tolist() == [5, 1, 7, 6, 2, 0, 4, 3]


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 500))
def test_an_order_holds_every_id_once(seed: int, epoch: int, size: int) -> None:
    assert sorted(permutation(seed, epoch, size).tolist()) == list(range(size))


def test_orders_of_two_epochs_differ() -> None:
    same = (permutation(0, 0, 1000) == permutation(0, 1, 1000)).sum()
    assert same < 10  # one in expectation


def test_layer_draws_repeat_for_the_same_step_and_differ_between_steps() -> None:
    def draw(step: int, part: int) -> torch.Tensor:
        seed_layers(3, step, 0, part)
        return torch.rand(4)

    assert torch.equal(draw(5, 0), draw(5, 0))
    assert not torch.equal(draw(5, 0), draw(6, 0))
    assert not torch.equal(draw(5, 0), draw(5, 1))
