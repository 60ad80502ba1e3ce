"""Who trains, validates and tests: shares of each class, whole groups, and nothing but seed and pixels decides."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsin.data.curation.assignment import LEFT_OUT, SPLITS, TEST, TRAIN, VAL, Fractions, assign
from opsin.errors import ConfigError, DataError
from tests.unit.data.curation.scenes import classes, looked_at, scene


def assigned(folder: Path, val: float = 0.1, test: float = 0.1, seed: int = 0) -> dict[str, str]:
    """The split of each image, by its path below the folder."""
    collection, found, groups = looked_at(folder)
    splits = assign(collection, found, groups, Fractions(val, test), seed=seed).tolist()
    names = [collection.location(index).removeprefix(f"{folder}/") for index in range(len(collection))]
    return {name: SPLITS[split] if split != LEFT_OUT else "" for name, split in zip(names, splits, strict=True)}


def counts(splits: dict[str, str]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for name, split in splits.items():
        found.setdefault(name.split("/")[0], Counter())[split] += 1
    return found


def test_each_class_has_its_rounded_share_in_each_split(tmp_path: Path) -> None:
    found = counts(assigned(classes(tmp_path, a=20, b=31, c=3), val=0.2, test=0.1))
    assert found == {
        "a": {"train": 14, "val": 4, "test": 2},
        "b": {"train": 22, "val": 6, "test": 3},
        "c": {"train": 1, "val": 1, "test": 1},
    }


def test_a_share_of_zero_makes_no_split(tmp_path: Path) -> None:
    found = counts(assigned(classes(tmp_path, a=10, b=2), val=0.3, test=0))
    assert found == {"a": {"train": 7, "val": 3}, "b": {"train": 1, "val": 1}}


def test_the_seed_decides_and_names_do_not(tmp_path: Path) -> None:
    folder = classes(tmp_path / "first", a=30, b=30)
    first = assigned(folder)
    assert assigned(folder) == first
    assert assigned(folder, seed=1) != first

    for number, name in enumerate(sorted(first)):
        # In another order than before.
        target = tmp_path / "second" / name.replace("/", f"/{37 * number % 91:02d}-")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, target)
    renamed = assigned(tmp_path / "second")
    assert {f"{name[:2]}{name[5:]}": split for name, split in renamed.items()} == first


def test_a_new_image_hardly_moves_the_others(tmp_path: Path) -> None:
    folder = classes(tmp_path, a=50)
    before = assigned(folder)
    scene(900).save(folder / "a" / "0-new.png")
    after = assigned(folder)
    moved = [name for name, split in before.items() if after[name] != split]
    # The newcomer may take one place in each small split.
    assert len(moved) <= 2


def test_copies_stay_together_in_any_seed(tmp_path: Path) -> None:
    folder = classes(tmp_path, a=12, b=12)
    for number in range(6):
        scene(number).resize((96, 80), Image.Resampling.BICUBIC).save(folder / "a" / f"copy{number}.jpg", quality=90)
    seen = set()
    for seed in range(12):
        splits = assigned(folder, val=0.2, test=0.2, seed=seed)
        for number in range(6):
            assert splits[f"a/{number:03d}.png"] == splits[f"a/copy{number}.jpg"]
            seen.add(splits[f"a/copy{number}.jpg"])
        assert counts(splits)["b"] == {"train": 8, "val": 2, "test": 2}
    assert seen == {"train", "val", "test"}


def test_a_group_larger_than_a_split_trains(tmp_path: Path) -> None:
    folder = classes(tmp_path, a=10)
    for number in range(5):
        shutil.copy(folder / "a" / "000.png", folder / "a" / f"copy{number}.png")
    for seed in range(5):
        splits = assigned(folder, val=0.2, test=0.2, seed=seed)
        assert {splits[name] for name in splits if "copy" in name} == {"train"}
        assert counts(splits)["a"] == {"train": 9, "val": 3, "test": 3}


def test_every_split_gets_one_of_few_large_groups(tmp_path: Path) -> None:
    folder = classes(tmp_path, a=3)
    for number in range(3):
        for copy in range(4 + number):
            shutil.copy(folder / "a" / f"{number:03d}.png", folder / "a" / f"copy-{number}-{copy}.png")
    splits = assigned(folder)
    assert set(splits.values()) == {"train", "val", "test"}
    assert all(
        len({split for name, split in splits.items() if name.startswith((f"a/{n:03d}", f"a/copy-{n}"))}) == 1
        for n in range(3)
    )


def test_images_without_labels_are_one_stratum(tmp_path: Path) -> None:
    for seed in range(20):
        scene(seed).save(tmp_path / f"{seed}.png")
    assert Counter(assigned(tmp_path, val=0.2, test=0.1).values()) == {"train": 14, "val": 4, "test": 2}


def test_unreadable_images_are_left_out_and_do_not_count(tmp_path: Path) -> None:
    folder = classes(tmp_path, a=10, b=10)
    for number in range(10):
        (folder / "a" / f"text{number}.png").write_text("no image")
    splits = assigned(folder, val=0.2, test=0.2)
    assert counts(splits)["a"] == {"train": 6, "val": 2, "test": 2, "": 10}
    assert all(not split for name, split in splits.items() if "text" in name)


def test_a_class_too_small_for_all_splits_is_named_with_its_count(tmp_path: Path) -> None:
    folder = classes(tmp_path, many=9, two=2, one=1)
    with pytest.raises(DataError) as caught:
        assigned(folder)
    way_out = "train, val and test need one each: add images, take the class out, or leave out a split with --val 0"
    assert [fault[: fault.index(" or --test 0")] for fault in caught.value.faults] == [
        f"{folder}: class one has 1 image; {way_out}",
        f"{folder}: class two has 2 images; {way_out}",
    ]


def test_copies_can_make_a_class_too_small(tmp_path: Path) -> None:
    folder = classes(tmp_path, a=5, b=1)
    for number in range(3):
        shutil.copy(folder / "b" / "000.png", folder / "b" / f"{number}.png")
    with pytest.raises(
        DataError, match="class b has 4 images, but too many are duplicates of each other or of another"
    ):
        assigned(folder)


@pytest.mark.parametrize(
    ("val", "test", "fault"),
    [
        (0.5, 0.5, "--val 0.5 --test 0.5: together 1, but below 1 leaves images to train on"),
        (-0.1, 0.2, "--val -0.1 --test 0.2: a share is 0 or more"),
        (0.0, 0.0, "--val 0 --test 0: no image would be held out"),
        (float("nan"), 0.1, "--val nan --test 0.1: a share is 0 or more"),
    ],
)
def test_shares_without_sense_are_refused(val: float, test: float, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        Fractions(val, test)


def test_targets_leave_one_image_to_train() -> None:
    for count in range(3, 40):
        for val, test in ((0.1, 0.1), (0.45, 0.45), (0.01, 0.98), (0.9, 0.05)):
            targets = Fractions(val, test).targets(count)
            assert min(targets.values()) >= 1
            assert sum(targets.values()) < count
            rounded = {VAL: max(1, round(count * val)), TEST: max(1, round(count * test))}
            if sum(rounded.values()) < count:
                assert targets == rounded
    assert Fractions(0.2, 0).splits == (TRAIN, VAL)
    assert np.array_equal(Fractions(0.2, 0.1).splits, (TRAIN, VAL, TEST))
