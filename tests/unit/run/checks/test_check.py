"""Planted faults, and whether `opsin check` finds each; a sound recipe has none."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from opsin.commands.main import main
from opsin.data.base import Source
from opsin.errors import ConfigError
from opsin.processes.headroom import Room, held_bytes
from opsin.run.checks.check import check_recipe
from opsin.run.checks.learning import check_learning
from opsin.run.checks.machine import (
    check_clock,
    check_directory,
    check_disk,
    check_loading,
    check_memory,
    check_shared_memory,
    check_threads,
)
from opsin.run.checks.pictures import check_pictures
from opsin.run.checks.verdict import Verdict
from opsin.run.forecast import forecast_memory
from opsin.run.parts import Parts, build_parts
from opsin.run.recipe import read
from opsin.storage.teller import Silence
from tests.cli.commands import pictures
from tests.digits_run import CONVNET, OVERRIDES, SMALL_VIT, train_digits
from tests.story import Story

pytestmark = pytest.mark.usefixtures("torch_switches", "short_measurements")
TINY = (*OVERRIDES, *SMALL_VIT)


@pytest.fixture
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.run.checks.machine._SECONDS", 0.02)


def parts_of(name: str = "quickstart", *keys: str) -> Parts:
    return build_parts(read(name, [*TINY, *keys]), Silence())


def memory_of(parts: Parts) -> Verdict:
    return check_memory(parts, forecast_memory(parts))


def said(verdicts: Iterator[Verdict], name: str) -> Verdict:
    (found,) = [verdict for verdict in verdicts if verdict.name == name]
    return found


def expect(verdict: Verdict, level: str, text: str) -> None:
    assert verdict.level == level, verdict
    assert re.search(text, verdict.text), verdict


def test_a_sound_recipe_has_no_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "quickstart", *TINY, "epochs=30", "--out", str(tmp_path / "run"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["faults"] == 0
    looked = {check["name"] for check in report["checks"]}
    assert looked >= {"recipe", "pictures", "classes", "sizes", "colours", "scores", "memory", "learns", "checkpoint"}
    assert looked >= {"loading", "disk", "threads", "directory", "clock", "best"}
    # Loading depends on the load of the machine.
    assert {check["level"] for check in report["checks"] if check["name"] != "loading"} == {"fine"}
    assert list(tmp_path.iterdir()) == []


def of_a_class_each(folder: Path) -> Path:
    return pictures(folder, count=12)


@pytest.mark.parametrize(
    ("keys", "name", "text"),
    [
        (["model.widht=3"], "recipe", "model.widht: unknown key; did you mean model.width"),
        (["data.path=nowhere"], "recipe", "nowhere"),
        (["data.holdout=0"], "scores", "no validation images to score"),
        (["data.labels=none"], "recipe", "labels"),
        (["batch_size=1000"], "recipe", "batch_size"),
        (["data.path=pictures/a", "data.labels=folders"], "recipe", "class"),
        (["model.weights=nowhere.safetensors"], "learns", "nowhere.safetensors"),
        (["checkpoints.best=vall/top1"], "best", "checkpoints.best=vall/top1: no evaluator of this name.*known: val"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_fault_of_the_recipe_is_found(
    keys: list[str], name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = of_a_class_each(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    recipe = [*TINY, "batch_size=8", f"data.path={images}", *keys]
    report = check_recipe("quickstart", recipe, tmp_path / "run", Story())
    faults = [verdict for verdict in report.verdicts if verdict.level == "fault"]
    assert [verdict.name for verdict in faults] == [name]
    expect(faults[0], "fault", text)


def test_damaged_pictures_are_counted(tmp_path: Path) -> None:
    folder = of_a_class_each(tmp_path / "pictures")
    for number in range(3):
        (folder / "a" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    few = [f"data.path={folder}", "batch_size=8", "data.holdout=0.1"]
    parts = parts_of("quickstart", *few)
    expect(said(check_pictures(parts.recipe, parts.images), "pictures"), "fault", "damaged.*0.png.*max_unreadable=0.01")
    parts = parts_of("quickstart", *few, "data.max_unreadable=0.9")
    expect(
        said(check_pictures(parts.recipe, parts.images), "pictures"), "look", r"\d of \d\d .* are damaged.*quarantine"
    )


def test_pictures_without_content_are_found(tmp_path: Path) -> None:
    folder = of_a_class_each(tmp_path / "pictures")
    for path in folder.rglob("*.png"):
        Image.new("RGB", (9, 9), (7, 7, 7)).save(path)
    parts = parts_of("quickstart", f"data.path={folder}", "batch_size=8")
    expect(said(check_pictures(parts.recipe, parts.images), "pictures"), "fault", "have a single colour")


def test_classes_that_cannot_be_learned_are_found(tmp_path: Path) -> None:
    unequal = pictures(tmp_path / "unequal", classes="a", count=40)
    shutil.copytree(pictures(tmp_path / "rare", classes="b", count=3) / "b", unequal / "b")
    parts = parts_of("quickstart", f"data.path={unequal}", "batch_size=8")
    expect(said(check_pictures(parts.recipe, parts.images), "classes"), "look", "a has 16 times the pictures of b")
    few = parts_of("quickstart", f"data.path={pictures(tmp_path / 'few', count=4)}", "batch_size=4")
    expect(said(check_pictures(few.recipe, few.images), "classes"), "look", "few for a")


def test_sizes_and_colours_of_other_pictures_are_found() -> None:
    parts = parts_of("quickstart", "data.image_size=32", "data.mean=[0.9,0.9,0.9]")
    verdicts = list(check_pictures(parts.recipe, parts.images))
    expect(said(iter(verdicts), "sizes"), "look", "8 to 8 px, trained at 32 px.*lower data.image_size")
    colours = said(iter(verdicts), "colours")
    expect(colours, "look", r"data.mean=\[0\.3\d\d,.* data.std=\[0\.3\d\d")
    # The keys that it names fit.
    fitting = re.findall(r"data\.\w+=\S+", colours.text)
    parts = parts_of("quickstart", *fitting)
    expect(said(check_pictures(parts.recipe, parts.images), "colours"), "fine", "mean -?0.00.*deviation 1.00")


@pytest.mark.parametrize(
    ("keys", "name", "level", "text"),
    [
        (["optim.lr=1e-12"], "learns", "fault", "opsin tune lr"),
        (["optim.lr=1e6"], "learns", "fault", "opsin tune lr"),
        (["ema={decay: 0.9999999999, warmup: false}"], "averages", "fault", "ema.decay is so near 1"),
        (["ema.decay=0.99"], "averages", "fine", "follows"),
        (
            ["method={name: dino, momentum: 1.0, momentum_batch_size: 16}"],
            "teacher",
            "fault",
            "method.momentum is so near",
        ),
        (["method={name: dino, momentum: 0.9, momentum_batch_size: 16}"], "teacher", "fine", "follows"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_learn_is_found(keys: list[str], name: str, level: str, text: str, tmp_path: Path) -> None:
    dino = ["evaluators.val=null", "checkpoints.best=null", "method.prototypes=32", "method.hidden=16"]
    network = CONVNET if keys[0].startswith("method") else SMALL_VIT
    recipe = read("quickstart", [*OVERRIDES, *network, *keys, *(dino if keys[0].startswith("method") else ())])
    parts = build_parts(recipe, Silence())
    expect(said(check_learning(recipe, parts.images, tmp_path), name), level, text)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_fit_the_machine_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room("free memory of this machine", held_bytes() + 2**30)
    monkeypatch.setattr("opsin.run.forecast.find_rooms", lambda: [room])
    parts = parts_of(
        "quickstart", "data.image_size=128", "model.patch=4", "batch_size=256", "evaluators.val.batch_size=8"
    )
    expect(memory_of(parts), "look", "MiB foreseen, .* MiB may be held .*; chosen: .*accumulate=")
    with pytest.raises(ConfigError, match="MiB foreseen"):
        memory_of(parts_of("quickstart", "data.image_size=4096", "model.patch=4", "batch_size=1"))
    small = parts_of()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096))
    expect(check_disk(small, forecast_memory(small), tmp_path), "fault", "0 MiB are free .* lower checkpoints.keep")


def test_a_small_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of("quickstart", "data.workers=4", "data.resident=false", "batch_size=1024", "data.image_size=64")
    expect(check_shared_memory(parts), "fine", r"MiB for batches of 12\.0 MiB")
    monkeypatch.setattr("opsin.run.checks.machine.available_bytes", lambda: 48 * 2**20)
    expect(check_shared_memory(parts), "look", "data.workers=2 data.prefetch=1 instead of 4 and 4: .*48.* /dev/shm")
    expect(check_shared_memory(parts_of()), "fine", "not needed")


def test_the_disk_that_a_run_takes_is_foreseen(tmp_path: Path) -> None:
    train_digits(tmp_path / "run")
    parts = parts_of()
    verdict = check_disk(parts, forecast_memory(parts), tmp_path)
    kept, foreseen = re.findall(r"(\d+) checkpoints and the weights take (\d+) MiB", verdict.text)[0]
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    one = sum(file.stat().st_size for file in newest.iterdir()) / 2**20
    assert int(kept) == 4
    assert int(foreseen) <= int(kept) * one + 1


def test_directories_that_are_taken_are_found(tmp_path: Path) -> None:
    expect(check_directory(tmp_path / "new" / "run"), "fine", "is free")
    (tmp_path / "notes.txt").touch()
    expect(check_directory(tmp_path), "fault", "holds other files")
    train_digits(tmp_path / "run")
    expect(check_directory(tmp_path / "run"), "look", "holds a run already")


def test_a_clock_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(check_clock(tmp_path), "fine", "plausible")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    expect(check_clock(tmp_path), "look", "differs by 1 h 0 min")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    expect(check_clock(tmp_path), "fault", "says 1970-01-01")


def test_too_many_threads_are_found() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert check_threads().level == "fine"
        torch.set_num_threads(8 * (os.cpu_count() or 1))
        expect(check_threads(), "look", "OMP_NUM_THREADS")
    finally:
        torch.set_num_threads(before)


def test_a_slow_data_path_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of("quickstart", "data.resident=false")
    read_one = type(parts.images.train).read

    def slowly(self: Source, index: int) -> torch.Tensor:
        time.sleep(0.01)
        return read_one(self, index)

    monkeypatch.setattr(type(parts.images.train), "read", slowly)
    expect(check_loading(parts.recipe, parts), "look", "training waits for its data; opsin tune loader")


def test_an_interrupted_check_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("opsin.run.checks.learning.read_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_recipe("quickstart", TINY, tmp_path / "run", Story())
    assert list(tmp_path.iterdir()) == []
