import pytest
import torch

from opsin.data.order import Order, share, steps_per_epoch
from opsin.errors import ConfigError
from opsin.timeline import Stage, Timeline


def order(samples: int, batch_size: int, *, epochs: float = 3, drop_last: bool = True, seed: int = 0) -> Order:
    steps = steps_per_epoch(samples, batch_size, drop_last=drop_last)
    return Order(seed=seed, samples=samples, timeline=Timeline([Stage(epochs, batch_size, steps)]), drop_last=drop_last)


def test_an_epoch_shows_every_image_once() -> None:
    whole = order(30, 10)
    for epoch in range(3):
        batches = [whole.ids(3 * epoch + batch) for batch in range(3)]
        assert [place for place, _ in batches] == [epoch] * 3
        assert sorted(torch.cat([ids for _, ids in batches]).tolist()) == list(range(30))


def test_epochs_and_seeds_have_different_orders() -> None:
    assert not torch.equal(order(30, 30).ids(0)[1], order(30, 30).ids(1)[1])
    assert not torch.equal(order(30, 30).ids(0)[1], order(30, 30, seed=1).ids(0)[1])


def test_a_step_has_the_same_batch_whatever_was_asked_before() -> None:
    forwards, backwards = order(50, 8), order(50, 8)
    expected = [forwards.ids(step)[1] for step in range(18)]
    for step in (17, 0, 9, 3, 16, 1):
        assert torch.equal(backwards.ids(step)[1], expected[step])


def test_drop_last_leaves_out_a_part_batch() -> None:
    assert steps_per_epoch(25, 10, drop_last=True) == 2
    shown = torch.cat([order(25, 10).ids(step)[1] for step in range(2)])
    assert len(shown.unique()) == 20


def test_without_drop_last_the_last_batch_is_short() -> None:
    assert steps_per_epoch(25, 10, drop_last=False) == 3
    whole = order(25, 10, drop_last=False)
    batches = [whole.ids(step)[1] for step in range(3)]
    assert [len(ids) for ids in batches] == [10, 10, 5]
    assert sorted(torch.cat(batches).tolist()) == list(range(25))


def test_a_stage_with_another_batch_size_starts_a_new_epoch() -> None:
    timeline = Timeline([Stage(1, 10, 3), Stage(1, 15, 2)])
    staged = Order(seed=0, samples=30, timeline=timeline, drop_last=True)
    assert [len(staged.ids(step)[1]) for step in range(5)] == [10, 10, 10, 15, 15]
    assert [staged.ids(step)[0] for step in range(5)] == [0, 0, 0, 1, 1]


def test_a_batch_larger_than_the_data_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=64.*only 50.*batch_size=50 or less, or data.drop_last=false"):
        steps_per_epoch(50, 64, drop_last=True)
    assert steps_per_epoch(50, 64, drop_last=False) == 1


def test_no_images_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 training images"):
        steps_per_epoch(0, 8, drop_last=False)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_make_up_the_batch_and_are_even(world: int) -> None:
    ids = torch.arange(20)
    parts = [ids[share(20, rank=rank, world=world)] for rank in range(world)]
    assert torch.equal(torch.cat(parts), ids)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
