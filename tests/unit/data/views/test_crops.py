from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from opsin.data.views.crops import (
    Box,
    Boxes,
    CenterCrop,
    Crop,
    PadCrop,
    RandomResizedCrop,
    Squash,
    WindowCrop,
    boxes_for,
    cut,
    cut_batch,
    cut_copies,
)
from opsin.data.views.resample import cut_views, resample


def boxes(crop: Crop, height: int, width: int, count: int = 2000, *, epoch: int = 0, copy: int = 0) -> Boxes:
    ids = torch.arange(count)
    sides = torch.full((count,), height), torch.full((count,), width)
    return boxes_for(crop, *sides, seed=3, epoch=epoch, ids=ids, view="image", copy=copy)


def one_box(top: int, left: int, height: int, width: int, *, flip: bool = False) -> Boxes:
    sides = [torch.tensor([value]) for value in (top, left, height, width)]
    return Boxes(sides[0], sides[1], sides[2], sides[3], torch.tensor([flip]))


def picture(height: int, width: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


crops = st.builds(
    lambda kind, size, flip, padding, interpolation, amount: {
        "pad": PadCrop(size=size, flip=flip, padding=padding, interpolation=interpolation, padding_px=amount),
        "window": WindowCrop(size=size, flip=flip, padding=padding, padding_px=amount),
        "resized": RandomResizedCrop(size=size, flip=flip, interpolation=interpolation),
        "center": CenterCrop(size=size, flip=flip, padding=padding, interpolation=interpolation, resize=size + amount),
        "wide": CenterCrop(size=size + amount, flip=flip, padding=padding, interpolation=interpolation, resize=size),
        "squash": Squash(size=size, flip=flip, interpolation=interpolation),
    }[kind],
    st.sampled_from(["pad", "window", "resized", "center", "wide", "squash"]),
    st.integers(2, 12),
    st.sampled_from(["none", "random", "alternate"]),
    st.sampled_from(["zero", "reflect"]),
    st.sampled_from(["bilinear", "bicubic"]),
    st.integers(0, 20),
)


@settings(deadline=None, max_examples=150)
@given(crops, st.integers(1, 14), st.integers(1, 14), st.integers(0, 3))
def test_both_executors_agree(crop: Crop, height: int, width: int, epoch: int) -> None:
    images = torch.stack([picture(height, width, seed=seed) for seed in range(5)])
    placed = boxes(crop, height, width, 5, epoch=epoch)
    together = cut_batch(images, placed, crop)
    for image, box, expected in zip(images, placed.one_by_one(), together, strict=True):
        assert torch.equal(cut(image, box, crop), expected)
        interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        assert torch.equal(cut(interleaved, box, crop), expected)
        assert torch.equal(cut(image, box, crop, interleaved=True), expected)


@pytest.mark.parametrize("side", [20, 64, 70])
def test_both_executors_agree_where_images_are_cut_together_and_one_by_one(side: int) -> None:
    images = torch.stack([picture(side, side, seed=seed) for seed in range(40)])
    crop = RandomResizedCrop(size=16, scale=(0.05, 1.0), interpolation="bicubic")
    placed = boxes(crop, side, side, 40)
    expected = torch.stack([cut(image, box, crop) for image, box in zip(images, placed.one_by_one(), strict=True)])
    assert torch.equal(cut_batch(images, placed, crop), expected)
    assert cut_batch(images, placed, crop).is_contiguous()


@settings(deadline=None, max_examples=150)
@given(crops, st.integers(2, 14), st.integers(2, 14))
def test_resampling_a_batch_as_on_a_gpu_agrees_within_one(crop: Crop, height: int, width: int) -> None:
    images = torch.stack([picture(height, width, seed=seed) for seed in range(5)])
    if crop.interpolation == "bicubic":
        # Between the two axes the CPU clips what overshoots 0..255; without strong edges nothing does.
        images, crop = images // 4 + 96, replace(crop, padding="reflect")
    placed = boxes(crop, height, width, 5)
    one_by_one = torch.stack([cut(image, box, crop) for image, box in zip(images, placed.one_by_one(), strict=True)])
    # The CPU rounds to whole numbers after each axis.
    resampled = resample(images, [placed], placed.table()[None], crop)[0]
    assert (resampled.int() - one_by_one.int()).abs().max() <= 1


def test_a_gpu_cuts_all_views_at_once_into_those_that_a_cpu_cuts() -> None:
    images = torch.stack([picture(20, 26, seed=seed) for seed in range(5)]) // 4 + 96  # nothing overshoots 0..255
    kinds: list[Crop] = [
        RandomResizedCrop(size=8, count=3, interpolation="bicubic"),
        PadCrop(size=20, padding_px=6),
        WindowCrop(size=9, count=2, padding_px=4, padding="reflect"),
        PadCrop(size=12, count=2, padding_px=5),
        PadCrop(size=7, padding_px=30, padding="reflect"),
    ]
    wanted = [(crop, [boxes(crop, 20, 26, 5, copy=copy) for copy in range(crop.count)]) for crop in kinds]
    for (crop, copies), views in zip(wanted, cut_views(images, wanted), strict=True):
        expected = cut_copies(images, copies, crop)
        assert views.shape == expected.shape == (crop.count, 5, 3, crop.size, crop.size)
        # Windows are copied; what is resized on a CPU is rounded to whole numbers after each axis.
        tolerance = 0 if copies[0].size() == (crop.size, crop.size) else 1
        assert (views.int() - expected.int()).abs().max() <= tolerance


@pytest.mark.parametrize("padding", ["zero", "reflect"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_box_over_the_border_shows_the_padded_image(padding: str, flip: bool) -> None:
    image = picture(9, 11)
    mode = {"zero": "constant", "reflect": "reflect"}[padding]
    expected = reference.pad(image, [4, 4, 4, 4], padding_mode=mode)[:, 1:9, 8:16]
    crop = PadCrop(size=8, padding=padding)  # type: ignore[arg-type]
    result = cut_batch(image[None], one_box(-3, 4, 8, 8, flip=flip), crop)[0]
    assert torch.equal(result, expected.flip(-1) if flip else expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_that_of_torchvision(interpolation: str) -> None:
    image = picture(40, 60)
    crop = RandomResizedCrop(size=16, interpolation=interpolation)  # type: ignore[arg-type]
    mode = reference.InterpolationMode(interpolation)
    expected = reference.resized_crop(image, 5, 7, 30, 45, [16, 16], interpolation=mode, antialias=True)
    assert torch.equal(cut(image, Box(5, 7, 30, 45, flip=False), crop), expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_pixels_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    image, crop = picture(300, 400), RandomResizedCrop(size=224)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = cut(image, Box(3, 5, 250, 310, flip=False), crop)
        torch.set_num_threads(threads)
        assert torch.equal(cut(image, Box(3, 5, 250, 310, flip=False), crop), expected)
    finally:
        torch.set_num_threads(before)


def test_a_padded_crop_reaches_every_offset_equally_often() -> None:
    placed = boxes(PadCrop(size=32, padding_px=4), 32, 32, 9000)
    counts = torch.bincount(placed.top + 4, minlength=9)
    assert counts.shape == (9,)
    # 1,000 expected for each of the nine offsets, with a standard deviation of 30.
    assert (counts - 1000).abs().max() < 150
    assert torch.equal(placed.height, torch.full((9000,), 32))


def test_a_padded_crop_of_a_larger_image_scales_with_its_shorter_side() -> None:
    placed = boxes(PadCrop(size=32, padding_px=4), 64, 96)
    assert placed.height.unique().tolist() == placed.width.unique().tolist() == [64]
    assert (int(placed.top.min()), int(placed.top.max())) == (-8, 8)
    assert (int(placed.left.min()), int(placed.left.max())) == (-8, 40)


def test_a_window_keeps_the_scale_of_the_image_and_reaches_every_place() -> None:
    placed = boxes(WindowCrop(size=24, padding_px=2), 32, 40, 9000)
    assert (placed.height.unique().tolist(), placed.width.unique().tolist()) == ([24], [24])
    assert placed.top.unique().tolist() == list(range(-2, 11))
    assert placed.left.unique().tolist() == list(range(-2, 19))
    whole, padded = (boxes(kind(size=32, padding_px=3), 32, 32) for kind in (WindowCrop, PadCrop))
    assert torch.equal(whole.top, padded.top)
    assert torch.equal(whole.left, padded.left)
    small = boxes(WindowCrop(size=24, padding_px=2), 16, 16, 3)
    assert small.top.tolist() == [-4] * 3, "an image that fills no window lies in its middle"


def test_a_random_resized_crop_stays_inside_with_the_allowed_area_and_ratio() -> None:
    placed = boxes(RandomResizedCrop(size=8, scale=(0.2, 0.5)), 400, 600)
    assert placed.top.min() >= 0
    assert (placed.top + placed.height).max() <= 400
    assert placed.left.min() >= 0
    assert (placed.left + placed.width).max() <= 600
    share = placed.height * placed.width / (400 * 600)
    # Sides of 180 pixels and more are rounded to whole ones: half a pixel is 0.3 %.
    assert 0.198 < share.min() < 0.21
    assert 0.49 < share.max() < 0.502
    ratio = (placed.width / placed.height).log()
    assert ratio.min() > torch.tensor(0.745).log()
    assert ratio.max() < torch.tensor(1.343).log()
    assert abs(float(ratio.mean())) < 0.02


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 1000, (10, 13)), (1000, 10, (13, 10))])
def test_an_image_where_no_proposal_fits_is_cropped_in_the_middle(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    placed = boxes(RandomResizedCrop(size=8, scale=(0.9, 1.0)), height, width, 50)
    assert set(zip(placed.height.tolist(), placed.width.tolist(), strict=True)) == {expected}
    assert placed.top.tolist() == [(height - expected[0]) // 2] * 50
    assert placed.left.tolist() == [(width - expected[1]) // 2] * 50


def test_a_center_crop_takes_the_middle_at_the_scale_of_resize() -> None:
    placed = boxes(CenterCrop(size=224, resize=256), 512, 768, 1)
    assert (int(placed.height[0]), int(placed.width[0])) == (448, 448)
    assert (int(placed.top[0]), int(placed.left[0])) == (32, 160)


def test_a_squash_shows_the_whole_image() -> None:
    image = picture(20, 30)
    placed = boxes(Squash(size=10, flip="none"), 20, 30, 1)
    assert torch.equal(
        cut(image, next(placed.one_by_one()), Squash(size=10)), reference.resize(image, [10, 10], antialias=True)
    )


def test_random_mirroring_turns_half_of_the_images_and_changes_with_the_epoch() -> None:
    first, second = (boxes(Squash(size=8), 8, 8, epoch=epoch).flip for epoch in (0, 1))
    assert 900 < int(first.sum()) < 1100
    assert 900 < int((first ^ second).sum()) < 1100


def test_alternate_mirroring_turns_every_image_in_every_second_epoch() -> None:
    turns = [boxes(Squash(size=8, flip="alternate"), 8, 8, epoch=epoch).flip for epoch in range(4)]
    assert 900 < int(turns[0].sum()) < 1100
    assert torch.equal(turns[1], ~turns[0])
    assert torch.equal(turns[2], turns[0])
    assert torch.equal(turns[3], turns[1])


def test_no_mirroring_where_none_is_asked_for() -> None:
    assert not boxes(Squash(size=8, flip="none"), 8, 8).flip.any()


def test_boxes_depend_on_copy_and_epoch_and_not_on_the_company() -> None:
    crop = RandomResizedCrop(size=8)
    whole = boxes(crop, 50, 70, 100)
    assert not torch.equal(whole.top, boxes(crop, 50, 70, 100, copy=1).top)
    assert not torch.equal(whole.top, boxes(crop, 50, 70, 100, epoch=1).top)
    ids = torch.tensor([17, 4])
    sides = torch.full((2,), 50), torch.full((2,), 70)
    few = boxes_for(crop, *sides, seed=3, epoch=0, ids=ids, view="image", copy=0)
    assert torch.equal(few.top, whole.top[ids])
    assert torch.equal(few.flip, whole.flip[ids])
