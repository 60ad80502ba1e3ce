from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from opsin.data.base import Source
from opsin.data.quarantine import Quarantine
from opsin.data.resident import Residence, Resident, read_everything
from opsin.data.sources.folder import open_folder
from opsin.data.views.crops import Crop, PadCrop, RandomResizedCrop
from opsin.data.workers import Reader, Task
from opsin.errors import ConfigError, DataError
from tests.unit.data.pictures import fill

CPU = torch.device("cpu")
CROPS: Mapping[str, Crop] = {"image": PadCrop(size=10), "small": RandomResizedCrop(size=6, count=2)}
NAMES = [f"{kind}/{number:02}.png" for kind in ("cat", "dog") for number in range(40)]


def load(source: Source, *, limit: float = 0.5, residence: Residence = "auto") -> Resident | None:
    quarantine = Quarantine(None, total=len(source), limit=limit)
    return Resident.load(source, seed=3, device=CPU, quarantine=quarantine, residence=residence)


def test_batches_are_those_that_are_read_one_by_one(tmp_path: Path) -> None:
    fill(tmp_path, *NAMES)
    (tmp_path / "dog/07.png").write_text("not an image")
    source = open_folder(tmp_path).train
    resident = load(source)
    assert resident is not None
    reader = Reader(source, seed=3)
    for epoch, ids in enumerate(torch.randperm(80, generator=torch.Generator().manual_seed(0)).view(4, 20)):
        task = Task(CROPS, epoch, ids)
        batch, expected = resident.read(task), reader.read(task)
        assert torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.ids, expected.ids)
        for name in CROPS:
            assert torch.equal(batch.views[name], expected.views[name])


def test_unreadable_images_are_listed_while_loading(tmp_path: Path) -> None:
    fill(tmp_path, *NAMES)
    (tmp_path / "cat/03.png").write_bytes(b"")
    source = open_folder(tmp_path).train
    quarantine = Quarantine(tmp_path / "quarantine.txt", total=80, limit=0.1)
    Resident.load(source, seed=3, device=CPU, quarantine=quarantine)
    [line] = (tmp_path / "quarantine.txt").read_text().splitlines()
    assert "cat/03.png" in line


def test_too_many_unreadable_images_are_an_error(tmp_path: Path) -> None:
    fill(tmp_path, *NAMES)
    for number in range(5):
        (tmp_path / f"cat/{number:02}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.max_unreadable"):
        load(open_folder(tmp_path).train, limit=0.01)


def test_images_of_several_sizes_stay_on_disk(tmp_path: Path) -> None:
    fill(tmp_path, *NAMES)
    Image.new("RGB", (20, 9)).save(tmp_path / "dog/20.png")
    source = open_folder(tmp_path).train
    assert load(source) is None
    with pytest.raises(ConfigError, match=r"data.resident=true: .*dog/20.png is 20 x 9 pixels.*data.resident=auto"):
        load(source, residence=True)


def test_large_sets_stay_on_disk_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_folder(fill(tmp_path, *NAMES)).train
    monkeypatch.setattr("opsin.data.resident.byte_limit", lambda _: 80 * 3 * 12 * 10 - 1)
    assert load(source) is None
    assert load(source, residence=True) is not None
    assert load(source, residence=False) is None


def test_everything_is_read_in_order(tmp_path: Path) -> None:
    fill(tmp_path, *NAMES)
    (tmp_path / "cat/03.png").write_bytes(b"")
    reader = Reader(open_folder(tmp_path).train, seed=3, unreadable="leave out")
    task = Task(CROPS, 0, torch.arange(80))
    whole = read_everything(reader, task, CPU)
    assert whole.ids.tolist() == [index for index in range(80) if index != 3]
    assert [failure.location for failure in whole.failures] == [reader.source.location(3)]
    expected = reader.read(task)
    assert all(torch.equal(whole.views[name], expected.views[name]) for name in CROPS)
