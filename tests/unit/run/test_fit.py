"""A run that does not fit into the memory it may hold: it is computed in parts, learns the same, and resumes so."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from opsin.errors import ConfigError
from opsin.processes.headroom import Room, held_bytes
from opsin.reporting.journal import read_rows
from opsin.run import fit
from opsin.run.fit import fit_memory
from opsin.run.forecast import MARGIN, forecast_memory
from opsin.run.parts import Parts, build_parts
from opsin.run.recipe import Recipe, read
from opsin.run.session import resume_run, train_recipe
from opsin.storage.teller import Silence
from tests.story import Record

pytestmark = [
    pytest.mark.usefixtures("torch_switches"),
    pytest.mark.skipif(held_bytes() == 0, reason="needs Linux"),
]

DINO = (
    *("dino-digits", "model.name=vit", "model.width=32", "model.depth=1", "model.heads=2", "model.patch=2"),
    *("method.prototypes=64", "method.hidden=32", "method.bottleneck=16", "method.views.local_count=2"),
    *("batch_size=700", "data.holdout=0.01", "precision=fp32", "device=cpu", "data.workers=0"),
    *(
        "optim.name=adamw",
        "optim.lr=0.001",
        "optim.clip_norm=null",
        "evaluators.knn=null",
        "evaluators.linear=null",
        "checkpoints.best=null",
        "checkpoints.background=false",
    ),
    *("log.every=1", "log.plots=false", "log.tensorboard=false", "log.csv=false"),
)
CONVNET = (
    *("quickstart", "data.image_size=16", "model.name=convnet", "model.widths=[32,32,32]", "batch_size=1024"),
    *("precision=fp32", "device=cpu", "data.workers=0", "evaluators.val=null"),
)


def parts_of(name: str, *changes: str) -> Parts:
    return build_parts(read(name, changes), Silence())


def give_room(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let a run hold so much, whatever this machine has."""

    def found() -> Sequence[Room]:
        return [Room("made for the test", num_bytes)]

    monkeypatch.setattr("opsin.run.forecast.find_rooms", found)
    monkeypatch.setattr("opsin.run.fit.find_rooms", found)
    monkeypatch.setattr("opsin.run.forecast.held_bytes", lambda: 2**30)  # else it grows while a test looks at it


def room_for(parts: Parts, share: float) -> int:
    """The room in which this share of the images of a batch fits at a time."""
    forecast = forecast_memory(parts)
    return int(MARGIN * (forecast.need("machine") - (1 - share) * forecast.divisible)) + 2**20


WAYS = {
    "fits": (1.1, (1, None, False), None),
    "parts": (0.6, (2, None, False), "accumulate=1 -> 2: 350 images at a time"),
    "pieces": (0.01, (64, 2, False), "memory.view_chunk=null -> 2"),
}


@pytest.mark.parametrize(("share", "chosen", "said"), WAYS.values(), ids=WAYS)
def test_the_ways_to_save_memory_are_taken_in_the_order_of_their_price(
    monkeypatch: pytest.MonkeyPatch, share: float, chosen: tuple[int, int | None, bool], said: str | None
) -> None:
    parts, record = parts_of(*DINO), Record()
    give_room(monkeypatch, 2**60)
    give_room(monkeypatch, room_for(parts, share))
    found = fit_memory(parts, record)
    memory = found.recipe.memory
    assert (found.recipe.accumulate, memory.view_chunk, memory.checkpoint_blocks) == chosen
    assert (found is parts) == (said is None)
    if said is not None:
        (notice,) = record.notices
        assert said in notice
        assert notice.endswith("the update stays the same")
        assert not forecast_memory(found).shortages()


def test_a_run_in_parts_learns_what_the_undivided_one_learns_and_keeps_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read(DINO[0], [*DINO[1:], "limits.steps=2"])
    train_recipe(recipe, tmp_path / "whole", name="whole", quiet=True)
    give_room(monkeypatch, 2**60)
    give_room(monkeypatch, room_for(build_parts(recipe, Silence()), 0.3))
    train_recipe(recipe, tmp_path / "parts", name="parts", quiet=True)
    whole, parts = (
        [row.values["train/loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    )
    assert parts == pytest.approx(whole, abs=1e-5)
    assert read(str(tmp_path / "whole" / "recipe.yaml")).accumulate == 1
    assert read(str(tmp_path / "parts" / "recipe.yaml")).accumulate == 4
    monkeypatch.undo()  # a larger machine
    train_recipe(recipe, tmp_path / "parts", name="parts", quiet=True)  # the same command again
    resume_run(tmp_path / "parts", ["limits.steps=3"], quiet=True)
    assert read(str(tmp_path / "parts" / "recipe.yaml")).accumulate == 4


def test_batch_norm_sees_smaller_parts_only_where_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(*CONVNET)
    give_room(monkeypatch, 2**60)
    give_room(monkeypatch, int(room_for(parts, 0.6) / MARGIN * 0.9))
    with pytest.raises(ConfigError, match="batch norm then sees smaller parts") as refused:
        fit_memory(parts, Silence())
    assert any("forward and backward pass" in line for line in refused.value.faults)
    give_room(monkeypatch, room_for(parts, 0.6))
    record = Record()
    found = fit_memory(with_recipe(parts, "memory.on_out_of_memory=always"), record)
    assert found.recipe.accumulate == 2
    assert "batch norm sees 512 images instead of the batch" in record.notices[-1]


def with_recipe(parts: Parts, *changes: str) -> Parts:
    recipe: Recipe = read(CONVNET[0], [*CONVNET[1:], *changes])
    return replace(parts, recipe=recipe)


def test_where_nothing_helps_the_table_and_the_way_out_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(*DINO)
    give_room(monkeypatch, 2**29)
    with pytest.raises(ConfigError) as refused:
        fit_memory(parts, Silence())
    first, *table, way_out = refused.value.faults
    assert "may be held (made for the test)" in first
    assert table[0].split()[0] == "memory"
    assert any("program and libraries" in line for line in table)
    assert "memory.fit=off" in way_out
    off = replace(parts, recipe=read(DINO[0], [*DINO[1:], "memory.fit=off"]))
    with fit.fitted(off, Silence()) as unchanged:
        assert unchanged is off


def test_an_update_that_cannot_be_foreseen_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(*DINO)

    def forward(*arguments: object) -> None:
        raise NotImplementedError("a fault of its own")

    parts.method.forward = forward  # type: ignore[method-assign, assignment]
    give_room(monkeypatch, 2**29)
    record = Record()
    assert fit_memory(parts, record) is parts
    assert "not foreseen" in record.notices[-1]
    assert "a fault of its own" in record.notices[-1]
