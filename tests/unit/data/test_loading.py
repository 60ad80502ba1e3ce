from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsin.clock import seeding
from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch, DataFacts, Source, Views
from opsin.data.loading import EvaluationData, LoadingPlan, TrainingData
from opsin.data.order import Order, steps_per_epoch
from opsin.data.quarantine import Quarantine
from opsin.data.resident import Residence
from opsin.data.sources.digits import load_digits
from opsin.data.sources.folder import open_folder
from opsin.data.views.colour import ColorJitter, GaussianBlur, Grayscale, RandomErasing, Solarize
from opsin.data.views.crops import CenterCrop, Crop, PadCrop, RandomResizedCrop
from opsin.data.views.mix import Mix
from opsin.data.workers import Reader
from opsin.errors import DataError
from tests.story import Story
from tests.unit.data.pictures import fill

CPU = torch.device("cpu")
NAMES = [f"{kind}/{number:02}.png" for kind in ("cat", "dog") for number in range(15)]
CROPS: Mapping[str, Crop] = {"global": RandomResizedCrop(size=8, count=2), "local": PadCrop(size=6, padding="reflect")}
VIEWS = Views(CROPS, {"global": [ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), RandomErasing()]})


def masks(seed: int, epoch: int, ids: Tensor) -> dict[str, Tensor]:
    draws = seeding.uniform(seed, epoch, ids, "masks", 5)
    return {"context": (draws * 16).long()}


def facts(source: Source, image_size: int = 8) -> DataFacts:
    return DataFacts(source.classes, len(source), image_size, 3, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


def training(
    source: Source,
    views: Views = VIEWS,
    *,
    workers: int = 0,
    resident: Residence = False,
    channels_last: bool = False,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = True,
) -> TrainingData:
    samples, batch_size = len(source), 8
    timeline = Timeline([Stage(4, batch_size, steps_per_epoch(samples, batch_size, drop_last=drop_last))])
    plan = LoadingPlan(
        source=source,
        facts=facts(source),
        device=CPU,
        workers=workers,
        prefetch=2,
        resident=resident,
        channels_last=channels_last,
        rank=rank,
        world=world,
    )
    order = Order(seed=1, labels=source.labels, timeline=timeline, drop_last=drop_last)
    return TrainingData(plan, [views], order, Quarantine(None, total=samples, limit=0.1))


def assert_equal(first: Batch, second: Batch) -> None:
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.labels, second.labels)
    assert first.views.keys() == second.views.keys()
    assert all(torch.equal(first.views[name], second.views[name]) for name in first.views)
    assert all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)


@pytest.fixture
def pictures(tmp_path: Path) -> Source:
    fill(tmp_path, *NAMES)
    (tmp_path / "dog/07.png").write_text("not an image")
    return open_folder(tmp_path).train


@pytest.mark.parametrize(("workers", "resident"), [(1, False), (3, False), (0, True), (1, "auto")])
def test_batches_are_the_same_whichever_way_they_are_read(pictures: Source, workers: int, resident: Residence) -> None:
    expected = list(training(pictures).batches(0, 8))
    batches = list(training(pictures, workers=workers, resident=resident).batches(0, 8))
    for batch, same in zip(batches, expected, strict=True):
        assert_equal(batch, same)


def test_digits_are_the_same_resident_and_from_workers() -> None:
    digits = load_digits()
    resident = list(training(digits, resident="auto").batches(220, 230))
    for batch, same in zip(training(digits, workers=2).batches(220, 230), resident, strict=True):
        assert_equal(batch, same)


def test_a_later_start_gives_the_same_batches(pictures: Source) -> None:
    data = training(pictures, Views(CROPS, VIEWS.augment, masks))
    whole = list(data.batches(0, 9))
    for batch, same in zip(data.batches(4, 9), whole[4:], strict=True):
        assert_equal(batch, same)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batch_of_one(pictures: Source, world: int) -> None:
    views = Views(CROPS, VIEWS.augment, masks)
    whole = list(training(pictures, views).batches(0, 4))
    ranks = [list(training(pictures, views, rank=rank, world=world).batches(0, 4)) for rank in range(world)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
        assert torch.equal(torch.cat([part.masks["context"] for part in parts]), batch.masks["context"])
        for name, view in batch.views.items():
            # Kernels may add the pixels of fewer images in another order.
            together = torch.cat([part.views[name] for part in parts], dim=1)
            torch.testing.assert_close(together, view, atol=1e-5, rtol=0)


def test_masks_change_with_the_epoch(pictures: Source) -> None:
    first, *_, later = training(pictures, Views(CROPS, {}, masks)).batches(0, 8)
    assert first.masks["context"].shape == (8, 5)
    both = set(first.ids.tolist()) & set(later.ids.tolist())
    assert both
    for image in both:
        drawn = [batch.masks["context"][batch.ids == image] for batch in (first, later)]
        assert not torch.equal(*drawn)


def test_a_short_last_batch_is_delivered(pictures: Source) -> None:
    sizes = [len(batch) for batch in training(pictures, drop_last=False).batches(0, 5)]
    assert sizes == [8, 8, 8, 6, 8]


def test_copies_and_epochs_differ(pictures: Source) -> None:
    data = training(pictures)
    first = next(data.batches(0, 1)).views["global"]
    assert first.shape == (2, 8, 3, 8, 8)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("resident", [False, True])
def test_channels_last_changes_the_memory_and_not_the_numbers(pictures: Source, resident: bool) -> None:
    plain = next(training(pictures, resident=resident).batches(0, 1))
    other = next(training(pictures, resident=resident, channels_last=True).batches(0, 1))
    assert_equal(other, plain)
    for name in CROPS:
        assert plain.views[name].is_contiguous()
        for copy in other.views[name]:
            assert copy.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("at_once", [1, 3])
def test_batches_do_not_depend_on_how_many_images_are_coloured_at_once(
    pictures: Source, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    views = Views(CROPS, {"global": [jitter, Grayscale(), GaussianBlur(), Solarize()], "local": [RandomErasing()]})
    expected = list(training(pictures, views).batches(0, 3))
    monkeypatch.setattr("opsin.data.loading.num_cached", lambda _: at_once)
    for batch, whole in zip(training(pictures, views).batches(0, 3), expected, strict=True):
        assert_equal(batch, whole)


@pytest.mark.parametrize("channels_last", [False, True])
def test_interleaved_views_become_the_same_batch(
    pictures: Source, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what a GPU is sent; here a CPU finishes them."""
    expected = next(training(pictures, channels_last=channels_last).batches(0, 1))
    monkeypatch.setattr("opsin.data.loading.Reader", lambda source, seed, **_: Reader(source, seed, interleaved=True))
    batch = next(training(pictures, channels_last=channels_last).batches(0, 1))
    assert_equal(batch, expected)
    assert all(batch.views[name].stride() == expected.views[name].stride() for name in CROPS)


def test_an_unreadable_image_is_replaced_with_its_label_and_listed(pictures: Source) -> None:
    data = training(pictures)
    quarantine = data._quarantine
    bad = 15 + 7
    shown = {int(i): int(y) for b in data.batches(0, 9) for i, y in zip(b.ids, b.labels, strict=True)}
    assert bad in shown
    assert all(label == pictures.labels[index] for index, label in shown.items() if index != bad)
    assert len(quarantine) == 1


def test_pixels_are_normalised(pictures: Source) -> None:
    data = training(pictures, Views({"image": CenterCrop(size=10, resize=10, flip="none")}))
    batch = next(data.batches(0, 1))
    assert batch.views["image"].dtype == torch.float32
    mean, std = torch.tensor(data.facts.mean)[:, None, None], torch.tensor(data.facts.std)[:, None, None]
    for index, image in zip(batch.ids.tolist(), batch.views["image"][0], strict=True):
        if index != 15 + 7:
            expected = (pictures.read(index)[:, 1:11] / 255 - mean) / std
            torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def evaluation(
    source: Source,
    story: Story | None = None,
    *,
    workers: int = 0,
    resident: Residence = "auto",
    rank: int = 0,
    world: int = 1,
) -> EvaluationData:
    plan = LoadingPlan(
        source=source,
        facts=facts(source, image_size=8),
        device=CPU,
        workers=workers,
        resident=resident,
        channels_last=True,
        rank=rank,
        world=world,
        teller=story or Story(),
    )
    return EvaluationData(plan, resize=10)


@pytest.mark.parametrize(("workers", "resident"), [(0, False), (2, False), (0, True)])
def test_evaluation_shows_each_readable_image_once_in_order(
    pictures: Source, workers: int, resident: Residence
) -> None:
    story = Story()
    data = evaluation(pictures, story, workers=workers, resident=resident)
    expected = [index for index in range(30) if index != 15 + 7]
    for _ in range(2):
        batches = list(data.batches(8))
        assert torch.cat([batch.ids for batch in batches]).tolist() == expected
        assert torch.equal(torch.cat([batch.labels for batch in batches]), pictures.labels[expected])
        for batch, same in zip(evaluation(pictures).batches(30), [batches], strict=True):
            assert torch.equal(torch.cat([part.views["image"] for part in same], dim=1), batch.views["image"])
    [warning] = story.warnings
    assert "1 of 30 evaluation images are unreadable" in warning
    assert "dog/07.png" in warning


def test_evaluation_is_shared_between_processes(pictures: Source) -> None:
    ids = [
        index
        for rank in range(4)
        for batch in evaluation(pictures, rank=rank, world=4).batches(3)
        for index in batch.ids.tolist()
    ]
    assert ids == [index for index in range(30) if index != 15 + 7]


def test_evaluation_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, *NAMES)
    for name in NAMES:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"30 of 30 evaluation images are unreadable.*none is left"):
        list(evaluation(open_folder(tmp_path).train).batches(8))


STAGES = [Stage(1, 8, 3, image_size=8), Stage(2, 12, 2, image_size=6, mix=False), Stage(1, 8, 3, image_size=10)]


def staged(source: Source, *, workers: int = 0, resident: Residence = False, mix_until: float = 1.0) -> TrainingData:
    """Three stages of several sizes, mixed but for the second."""
    op = Mix(mixup=1.0, cutmix=0.0)
    views = [
        Views({"image": RandomResizedCrop(size=stage.image_size)}, mix=op, mix_until=mix_until) for stage in STAGES
    ]
    plan = LoadingPlan(source=source, facts=facts(source), device=CPU, workers=workers, resident=resident)
    order = Order(seed=1, labels=source.labels, timeline=Timeline(STAGES), drop_last=True)
    return TrainingData(plan, views, order, Quarantine(None, total=len(source), limit=0.1))


@pytest.mark.parametrize(("workers", "resident"), [(2, False), (0, True)])
def test_every_stage_has_its_own_size_and_is_the_same_from_any_step_on(
    pictures: Source, workers: int, resident: Residence
) -> None:
    whole = list(staged(pictures).batches(0, 10))
    assert [tuple(batch.views["image"].shape[1:3]) for batch in whole] == [(8, 3)] * 3 + [(12, 3)] * 4 + [(8, 3)] * 3
    assert [batch.views["image"].shape[-1] for batch in whole] == [8] * 3 + [6] * 4 + [10] * 3
    for first in (0, 2, 3, 5, 7, 9):
        again = list(staged(pictures, workers=workers, resident=resident).batches(first, 10))
        for batch, same in zip(again, whole[first:], strict=True):
            assert_equal(batch, same)


def test_images_are_mixed_where_the_stage_and_the_time_say_so(pictures: Source) -> None:
    # Four epochs in all: half of the run ends with the second epoch, within a stage that does not mix anyway.
    for until, expected in ((1.0, [True] * 3 + [False] * 4 + [True] * 3), (0.5, [True] * 3 + [False] * 7)):
        batches = list(staged(pictures, mix_until=until).batches(0, 10))
        assert [batch.blend is not None for batch in batches] == expected
        plain = training(pictures, Views({"image": RandomResizedCrop(size=8)})).batches(0, 3)
        for batch, unmixed in zip(batches[:3], plain, strict=True):
            blend = batch.blend
            assert blend is not None
            # Each image is its own share of itself and the rest of one other image of the batch, by their labels.
            own = blend.shares[:, None, None, None] * unmixed.views["image"][0]
            rest = batch.views["image"][0] - own
            matches = [
                any(
                    torch.allclose(rest[image], (1 - blend.shares[image]) * unmixed.views["image"][0, other], atol=1e-5)
                    and blend.labels[image] == unmixed.labels[other]
                    for other in range(8)
                )
                for image in range(8)
            ]
            assert all(matches)
