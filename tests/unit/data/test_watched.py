"""Images under supervision: which one is in hand, and which are left out."""

import json
import pickle
import threading
from array import array
from pathlib import Path

import pytest
import torch

from opsin.data.quarantine import read_or_replace, watch
from opsin.errors import DataError, RunError, TransientError
from opsin.processes.excluded import ExcludedImage, read_excluded, write_excluded
from opsin.processes.trail import LastActivity, Trail, follow
from tests.unit.data.test_quarantine import images


def test_unsupervised_and_with_nothing_put_aside_the_source_is_itself(tmp_path: Path) -> None:
    source = images(tmp_path / "data", 3, set())
    assert watch(source, Trail(), tmp_path / "put_aside.json") is source


def test_an_image_that_is_put_aside_is_replaced_as_an_unreadable_one(tmp_path: Path) -> None:
    source = images(tmp_path / "data", 30, set())
    damaged = images(tmp_path / "damaged", 30, {4})
    write_excluded(tmp_path / "put_aside.json", [ExcludedImage(4, "training crashed with it")])
    watched = watch(source, Trail(), tmp_path / "put_aside.json")
    read, same = read_or_replace(watched, 4, seed=3), read_or_replace(damaged, 4, seed=3)
    assert read.index == same.index != 4
    assert torch.equal(read.image, same.image)
    (failure,) = read.failures
    assert (failure.location, failure.reason) == (source.location(4), "training crashed with it")
    (kept,) = read_excluded(tmp_path / "put_aside.json")
    assert kept.location == source.location(4)


def test_images_that_have_changed_are_refused(tmp_path: Path) -> None:
    source = images(tmp_path / "data", 6, set())
    for aside in (ExcludedImage(4, "x", "elsewhere.png"), ExcludedImage(40, "x")):
        write_excluded(tmp_path / "put_aside.json", [aside])
        with pytest.raises(DataError, match="the images have changed"):
            watch(source, Trail(), tmp_path / "put_aside.json")


def test_a_damaged_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "put_aside.json").write_text(json.dumps([{"index": "x"}]))
    with pytest.raises(RunError, match="is damaged"):
        read_excluded(tmp_path / "put_aside.json")


def test_of_two_entries_for_an_image_the_first_is_kept(tmp_path: Path) -> None:
    write_excluded(tmp_path / "list", [ExcludedImage(9, "old"), ExcludedImage(3, "new"), ExcludedImage(9, "new")])
    assert read_excluded(tmp_path / "list") == (ExcludedImage(3, "new"), ExcludedImage(9, "old"))


def test_a_trail_tells_the_step_its_images_and_what_is_in_hand(tmp_path: Path) -> None:
    assert follow(tmp_path) == LastActivity()
    trail = pickle.loads(pickle.dumps(Trail(tmp_path)))  # as a worker gets it
    trail.at_step(41)
    assert follow(tmp_path) == LastActivity(41)
    trail.at_step(41, array("q", [7, 3, 5]).tobytes())
    thread = threading.Thread(target=trail.begin_reading, args=(17, "a/17.png"))
    thread.start()
    thread.join()
    trail.begin_reading(4, "a/4.png")
    trail.end_reading()
    where = follow(tmp_path)
    assert (where.step, where.ids) == (41, (7, 3, 5))
    assert [(reading.index, reading.location) for reading in where.reading] == [(17, "a/17.png")]
    trail.at_step(42)  # a shorter entry leaves nothing of the longer one
    assert follow(tmp_path).ids == ()


class Fragile:
    """A source whose reader fails with `error`."""

    name = "fragile"
    classes: tuple[str, ...] = ("a",)
    labels = torch.zeros(6, dtype=torch.int64)

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 6

    def read(self, index: int) -> torch.Tensor:
        raise self.error

    def location(self, index: int) -> str:
        return f"{index}.png"


def test_an_image_that_cannot_be_read_is_no_longer_in_hand_and_one_that_fails_otherwise_is(tmp_path: Path) -> None:
    source = images(tmp_path / "data", 6, {2})
    folder = tmp_path / "trail"
    folder.mkdir()
    read_or_replace(watch(source, Trail(folder), tmp_path / "put_aside.json"), 2, seed=0)
    assert follow(folder).reading == ()
    unreachable = Fragile(TransientError("5.png: cannot be read: the network is away"))
    with pytest.raises(TransientError):
        watch(unreachable, Trail(folder), tmp_path / "put_aside.json").read(5)
    assert follow(folder).reading == ()
    with pytest.raises(RuntimeError):
        watch(Fragile(RuntimeError("broken")), Trail(folder), tmp_path / "put_aside.json").read(5)
    assert [(reading.index, reading.location) for reading in follow(folder).reading] == [(5, "5.png")]


def test_a_folder_that_is_gone_costs_nothing(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "gone")
    trail.at_step(3)
    trail.begin_reading(1, "x")
    trail.end_reading()
    trail.verdict("x")
