"""Settings of the data path are measured, the best is chosen by what training does with it, and nothing is left."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opsin.errors import ConfigError
from opsin.run.recipe import Recipe, read
from opsin.storage.teller import Silence
from opsin.tuning.loader import LoaderReport, Rate, Setting, choose_best, measure_copies, tune_loader
from tests.digits_run import OVERRIDES, SMALL_VIT
from tests.story import Record
from tests.unit.data.pictures import fill

RESIDENT = Setting(0, 1, resident=True)


def recipe(*keys: str) -> Recipe:
    return read("quickstart", [*OVERRIDES, *SMALL_VIT, *keys])


def rate(workers: int, prefetch: int, training: float, *, data: float = 5000) -> Rate:
    return Rate(Setting(workers, prefetch), pinned=False, data=data, training=training, start_s=0.5)


def of(*rates: Rate, step: float = 1000, device: str = "cuda", not_resident: str = "") -> LoaderReport:
    return LoaderReport(
        device=device,
        stage="the whole run",
        batch_size=64,
        steps=(step, step),
        rates=rates,
        best=choose_best(rates),
        not_resident=not_resident,
        unpinned=None,
        pinned=None,
    )


def silent(text: str) -> None:
    """Hears nothing."""


def test_the_fewest_workers_win_among_equals() -> None:
    rates = [rate(0, 2, 500), rate(1, 2, 975), rate(1, 4, 990), rate(2, 2, 1000), rate(4, 4, 996)]
    assert choose_best(rates) == Setting(1, 2)
    assert choose_best([*rates, rate(8, 4, 1100)]) == Setting(8, 4)


def test_the_verdict_says_who_waits() -> None:
    fed = of(rate(0, 2, 500), rate(2, 4, 990), not_resident="the images have several sizes")
    assert fed.verdict() == [
        "the data waits for the step: with the best setting training is as fast as the step alone",
        "best: data.workers=2 data.prefetch=4",
        "data.resident=true is not possible: the images have several sizes",
    ]
    hungry = of(rate(0, 2, 300), rate(2, 4, 600), not_resident="no")
    assert hungry.verdict()[0] == "training waits for the data: 40% of its time even with the best setting"
    assert "more cores would help" in hungry.verdict()[1]
    assert "share the cores" in replace(hungry, device="cpu").verdict()[1]


def test_residence_is_compared_with_the_best_of_the_others() -> None:
    better = of(rate(0, 2, 300), rate(2, 4, 600), Rate(RESIDENT, pinned=False, data=9e5, training=900, start_s=4.0))
    assert better.best_keys == "data.resident=true"
    assert better.verdict()[-1] == "data.resident=true: 1.50 times the best of the others"
    worse = of(rate(2, 4, 600), Rate(RESIDENT, pinned=False, data=9e5, training=450, start_s=4.0))
    # Else `auto` would take it.
    assert worse.best_keys == "data.workers=2 data.prefetch=4 data.resident=false"
    assert worse.verdict()[-1] == "data.resident=true: 0.75 times the best of the others"


def test_a_busy_machine_is_told() -> None:
    report = replace(of(rate(0, 2, 990)), steps=(700.0, 1000.0))
    assert report.verdict()[0].startswith("unsteady: the step alone did 700 images/s at first, 1,000 at the end; ")
    assert report.step == 1000


@pytest.mark.usefixtures("torch_switches")
def test_every_setting_is_measured_and_no_worker_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.tuning.loader.num_cores", lambda: 2)
    record = Record()
    # A run that would end after two steps, with a score that nobody asks for here.
    report = tune_loader(recipe("limits.steps=2"), seconds=0.05, teller=record)
    expected = [Setting(0, 2), Setting(1, 2), Setting(1, 4), Setting(2, 2), Setting(2, 4), RESIDENT]
    assert [each.setting for each in report.rates] == expected
    assert all(min(each.data, each.training, each.start_s) > 0 for each in report.rates)
    assert not any(each.pinned for each in report.rates)
    assert min(report.steps) > 0
    assert report.best in expected
    assert (report.device, report.stage, report.batch_size, report.pinned) == ("cpu", "the whole run", 256, None)
    assert record.notices[0].startswith("data: found the digits")
    assert record.notices[2:] == [f"measuring {setting.keys}" for setting in expected]
    assert multiprocessing.active_children() == []

    lines = report.lines()
    assert lines[0] == "images per second in the whole run, batches of 256 on cpu:"
    assert lines[1].split() == ["workers", "prefetch", "pinned", "data", "alone", "training", "start"]
    assert [line.split()[:2] for line in lines[2:8]] == [
        *([["0", "-"], ["1", "2"], ["1", "4"], ["2", "2"], ["2", "4"]]),
        ["resident", "-"],
    ]
    assert set(report.as_dict()) >= {"rates", "steps", "best", "verdict", "device", "batch_size"}


@pytest.mark.usefixtures("torch_switches")
def test_images_of_several_sizes_cannot_be_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr("opsin.tuning.loader.num_cores", lambda: 1)
    folder = fill(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(6)))
    Image.new("RGB", (30, 20)).save(folder / "b" / "other.png")
    keys = (f"data.path={folder}", "batch_size=4", "data.holdout=0", "evaluators.val=null", "optim.lr=0.01")
    report = tune_loader(recipe(*keys), seconds=0.01, teller=Silence())
    assert len(report.rates) == 3
    assert report.verdict()[-1] == "data.resident=true is not possible: the images have several sizes"


@pytest.mark.usefixtures("torch_switches")
def test_the_first_stage_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.tuning.loader.num_cores", lambda: 1)
    stages = "stages=[{name: small, epochs: 1, batch_size: 32}, {name: large, epochs: 1, batch_size: 128}]"
    report = tune_loader(recipe("epochs=null", stages), seconds=0.01, teller=Silence())
    assert (report.stage, report.batch_size) == ("small", 32)


def test_copies_are_measured_with_and_without_workers() -> None:
    for workers in (0, 1):
        found = measure_copies(recipe(), Setting(workers, 2), 0.01, torch.device("cpu"), pin=False)
        assert found > 0
    assert multiprocessing.active_children() == []


@pytest.mark.gpu
@pytest.mark.usefixtures("torch_switches")
def test_pinning_is_measured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.tuning.loader.num_cores", lambda: 1)
    report = tune_loader(recipe("device=cuda"), seconds=0.05, teller=Silence())
    assert report.pinned is not None
    assert report.unpinned is not None
    assert [each.pinned for each in report.rates] == [False, True, True, False]
    assert any(line.startswith("data path up to the GPU: ") for line in report.verdict())


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_without_sense_are_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="must be above 0; use --seconds 2"):
        tune_loader(recipe(), seconds=seconds, teller=Silence())
