import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.clock.timeline import Stage, Timeline
from opsin.data import order as order_module
from opsin.data.order import Order, check_share, class_share, share, steps_per_epoch
from opsin.errors import ConfigError
from opsin.training.state import Detour


def order(samples: int, batch_size: int, *, epochs: float = 3, drop_last: bool = True, seed: int = 0) -> Order:
    steps = steps_per_epoch(samples, batch_size, drop_last=drop_last)
    return Order(
        seed=seed,
        labels=torch.zeros(samples, dtype=torch.int64),
        timeline=Timeline([Stage(epochs, batch_size, steps)]),
        drop_last=drop_last,
    )


def test_an_epoch_shows_every_image_once() -> None:
    whole = order(30, 10)
    for epoch in range(3):
        batches = [whole.ids(3 * epoch + batch) for batch in range(3)]
        assert [place.epoch for place, _ in batches] == [epoch] * 3
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
    staged = Order(seed=0, labels=torch.zeros(30, dtype=torch.int64), timeline=timeline, drop_last=True)
    assert [len(staged.ids(step)[1]) for step in range(5)] == [10, 10, 10, 15, 15]
    assert [staged.ids(step)[0].epoch for step in range(5)] == [0, 0, 0, 1, 1]


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


LABELS = torch.tensor([0] * 60 + [1] * 25 + [-1] * 15)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]


def test_a_share_takes_its_part_of_every_class() -> None:
    kept = LABELS[class_share(LABELS, 0.5, seed=0)]
    assert [(kept == label).sum().item() for label in (0, 1, -1)] == [30, 13, 8]  # halves are rounded up
    assert torch.equal(class_share(LABELS, 1.0, seed=0), torch.arange(100))
    assert not torch.equal(class_share(LABELS, 0.5, seed=0), class_share(LABELS, 0.5, seed=1))


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_smaller_share_is_part_of_a_larger_one(one: float, other: float) -> None:
    small, large = (set(class_share(LABELS, share, seed=3).tolist()) for share in sorted((one, other)))
    assert small <= large


@pytest.mark.parametrize(("count", "fraction", "kept"), [(50, 0.29, 15), (50, 0.57, 29), (40_000_001, 0.5, 20_000_001)])
def test_a_share_is_rounded_as_it_is_written(count: int, fraction: float, kept: int) -> None:
    """Half an image counts as one, although 0.29 * 50 is 14.499999999999998 and float32 has 24 bits."""
    assert order_module._kept(torch.tensor([count]), fraction).tolist() == [kept]


@pytest.mark.parametrize("fraction", [0.49999999, 0.5, 0.009999999, 0.01])
def test_the_check_of_a_share_counts_like_the_share_itself(fraction: float) -> None:
    labels = torch.zeros(round(0.5 / fraction), dtype=torch.int64)
    kept = len(class_share(labels, fraction, seed=0))
    if kept:
        check_share(labels, fraction, ["cat"], key="data_fraction")
    else:
        with pytest.raises(ConfigError, match="none would be left"):
            check_share(labels, fraction, ["cat"], key="data_fraction")


def test_a_stage_shows_its_share_of_the_images_once_an_epoch() -> None:
    timeline = Timeline([Stage(2, 10, 5, data_fraction=0.5), Stage(1, 20, 5)])
    staged = Order(seed=0, labels=LABELS, timeline=timeline, drop_last=True)
    epochs = [torch.cat([staged.ids(5 * epoch + batch)[1] for batch in range(5)]) for epoch in range(3)]
    half = class_share(LABELS, 0.5, seed=0).tolist()
    assert len(half) == 51
    for epoch in epochs[:2]:
        assert len(set(epoch.tolist())) == 50
        assert set(epoch.tolist()) <= set(half)
    assert sorted(epochs[2].tolist()) == list(range(100))
    assert not torch.equal(epochs[0], epochs[1])


def test_a_share_that_leaves_a_class_empty_names_it_and_the_least_that_serves() -> None:
    check_share(LABELS, 0.04, ("cat", "dog"), key="stages.0.data_fraction")
    with pytest.raises(ConfigError, match=r"stages.0.data_fraction=0.03: of the 15 images of class without a label"):
        check_share(LABELS, 0.03, ("cat", "dog"), key="stages.0.data_fraction")
    known = LABELS[LABELS >= 0]
    with pytest.raises(ConfigError, match=r"of the 25 images of class 'dog' none would be left; use at least 0.02$"):
        check_share(known, 0.01, ("cat", "dog"), key="stages.0.data_fraction")


@pytest.mark.parametrize("count", [3, 7, 13, 29, 997])
def test_the_share_that_is_proposed_serves(count: int) -> None:
    labels = torch.zeros(count, dtype=torch.int64)
    with pytest.raises(ConfigError) as caught:
        check_share(labels, 1e-5, ("cat",), key="data_fraction")
    check_share(labels, float(str(caught.value).rpartition(" ")[2]), ("cat",), key="data_fraction")


def taken(first: int, last: int, attempt: int = 1) -> Detour:
    return Detour(first, last, attempt, "trouble", 1.0, first)


def shown(source: Order, steps: range, *detours: Detour) -> list[int]:
    return [index for step in steps for index in source.ids(step, detours)[1].tolist()]


def test_a_detour_shows_other_images_of_the_same_pass() -> None:
    # 100 images make 10 batches: the detour lies in the second pass.
    source, detour = order(100, 10), taken(13, 16)
    bad = shown(source, range(13, 16))
    instead = shown(source, range(13, 16), detour)
    assert not set(bad) & set(shown(source, range(10, 20), detour)), "the bad images sit out"
    assert len(set(instead)) == len(bad)
    for step in [*range(13), *range(16, 30)]:
        assert torch.equal(source.ids(step, [detour])[1], source.ids(step)[1])
        assert source.ids(step, [detour])[0] == source.ids(step)[0]


def test_draws_of_a_detour_are_others() -> None:
    source, detours = order(100, 10), [taken(13, 16), taken(15, 18, attempt=2)]
    epochs = [source.ids(step, detours)[0].epoch for step in range(12, 19)]
    assert epochs[0] == epochs[-1] == 1
    assert len({*epochs[1:3]}) == len({*epochs[3:6]}) == 1
    assert len({*epochs}) == 3
    assert all(epoch % 2 == 1 for epoch in epochs), "what alternates from pass to pass does so in a detour"


def test_a_second_detour_avoids_the_images_of_both() -> None:
    source, first, second = order(100, 10), taken(13, 15), taken(12, 16, attempt=2)
    bad = {*shown(source, range(13, 15)), *shown(source, range(12, 16), first)}
    instead = shown(source, range(12, 16), first, second)
    assert not bad & set(instead)
    assert set(instead) != set(shown(source, range(12, 16), first))


def test_a_detour_over_a_whole_pass_shows_its_images_in_another_order() -> None:
    source, detour = order(30, 10), taken(2, 7)
    assert sorted(shown(source, range(3, 6), detour)) == list(range(30))
    assert shown(source, range(3, 6), detour) != shown(source, range(3, 6))


@given(st.integers(0, 28), st.integers(1, 12), st.integers(0, 29))
def test_a_step_has_the_same_batch_in_a_detour_whatever_was_asked_before(first: int, length: int, step: int) -> None:
    detours = (taken(first, first + length), taken(max(0, first - 2), first + 3, attempt=2))
    used = order(50, 5)
    for other in (0, 29, step, 7):
        used.ids(other)
        used.ids(other, detours)
    assert torch.equal(used.ids(step, detours)[1], order(50, 5).ids(step, detours)[1])
