"""One recipe, one set of bytes: however the run is cut into sessions, loaded with images, and looked at."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from opsin.commands.verify import digest
from opsin.errors import CheckpointError, Stopped
from opsin.reporting.journal import Row, read_events, read_rows
from opsin.run.recipe import Recipe, read
from opsin.run.session import resume_run, train_recipe
from opsin.storage.directory import RunDirectory
from opsin.training.checkpoints.format import find_checkpoints
from tests.digits_run import BROKEN_UP, CONVNET, OF_THE_MACHINE, VIT
from tests.unit.data.pictures import fill

pytestmark = pytest.mark.usefixtures("torch_switches")

STEPS = 24
SHORT = (*BROKEN_UP, f"limits.steps={STEPS}")
SMALL = (*SHORT, *VIT, "precision=fp32")
RICH = tuple(f"method.views.{text}" for text in ("crop=resized", "flip=random", "brightness=0.4", "erasing=0.5"))


def recipe(*overrides: str) -> Recipe:
    return read("quickstart", overrides)


def trained(out: Path, *overrides: str) -> RunDirectory:
    return RunDirectory(train_recipe(recipe(*overrides), out, name="exact", quiet=True).directory.path)


def trained_in_parts(out: Path, cuts: Sequence[int], *overrides: str) -> RunDirectory:
    """The same in sessions that each end after one of the steps `cuts`."""
    trained(out, *overrides, f"limits.steps={cuts[0]}")
    for cut in cuts[1:]:
        resume_run(out, [f"limits.steps={cut}"], quiet=True)
    return RunDirectory(resume_run(out, [f"limits.steps={STEPS}"], quiet=True).directory.path)


def learned(run: RunDirectory) -> dict[int, Row]:
    """The journal by step, without what depends on the speed of the machine."""
    rows = {}
    for row in read_rows(run.metrics):
        assert row.step not in rows, "no step stands twice"
        timeless_names = (name for name in row.values if not name.startswith(OF_THE_MACHINE))
        values = {name: row.values[name] for name in timeless_names}
        rows[row.step] = Row(row.step, row.epoch, 0.0, values)
    return rows


def events(run: RunDirectory, kind: str) -> list[int]:
    return [event.step for event in read_events(run.events) if event.kind == kind]


@pytest.mark.parametrize(
    "overrides",
    [
        (*VIT, "precision=fp32"),
        (*VIT, "precision=bf16"),
        # A scale of 2**16 overflows at first: cancelled updates and a falling scale are part of the state.
        (*VIT, "precision=fp16", "optim.name=sgd"),
        (*CONVNET, "precision=fp32", "optim.name=sgd"),
        (*CONVNET, "precision=bf16", "optim.name=muon", "data.drop_last=false"),
    ],
    ids=["vit fp32 adamw", "vit bf16 adamw", "vit fp16 sgd", "convnet fp32 sgd", "convnet bf16 muon"],
)
def test_sessions_of_any_length_add_up(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    whole = trained(tmp_path / "whole", *SHORT, *overrides)
    parts = trained_in_parts(tmp_path / "parts", [1, 13, 16, 23], *SHORT, *overrides)
    assert digest(parts) == digest(whole)


def test_a_session_may_be_as_short_as_a_step(tmp_path: Path) -> None:
    short = (*SMALL, "limits.steps=10", "data.holdout=0.9", "batch_size=32")
    whole = trained(tmp_path / "whole", *short)
    out = tmp_path / "parts"
    for step in range(1, 10):
        with pytest.raises(Stopped, match=rf"limits.hours = 1e-09 reached: stopped after step {step} of 10"):
            trained(out, *short, "limits.hours=1e-9")
    parts = trained(out, *short, "limits.hours=1e-9")  # the last step ends the run, stopped or not
    assert digest(parts) == digest(whole)
    assert list(learned(parts)) == list(range(1, 11))


@pytest.mark.parametrize("every", ["7 steps", "0.3 epochs", "0.0001 minutes", "never"])
def test_when_checkpoints_are_written_changes_no_weight(tmp_path: Path, every: str) -> None:
    whole = trained(tmp_path / "whole", *SMALL)
    parts = trained_in_parts(tmp_path / "parts", [9], *SMALL, f"checkpoints.every={every}")
    assert digest(parts) == digest(whole)


def test_rows_at_the_same_steps_are_equal(tmp_path: Path) -> None:
    whole = learned(trained(tmp_path / "whole", *SMALL))
    # The end of an epoch has a row in any case; its evaluation is not repeated.
    parts = learned(trained_in_parts(tmp_path / "parts", [16], *SMALL))
    assert parts == whole


def test_without_anything_that_looks_the_weights_are_the_same(tmp_path: Path) -> None:
    looked_at = trained(tmp_path / "looked-at", *SMALL, "log.every=1", "evaluators.val.every=3 steps")
    blind = ("evaluators.val=null", "log.every=1000", "log.csv=false", "checkpoints.every=never")
    assert digest(trained(tmp_path / "blind", *SMALL, *blind)) == digest(looked_at)


def test_pictures_reach_the_network_the_same_way_from_memory_and_from_workers(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", *(f"{name}/{index}.png" for name in "abc" for index in range(24)))
    short = (f"data.path={folder}", "data.image_size=8", "batch_size=16", "epochs=2", "data.holdout=0.2", *RICH, *VIT)
    ways = [
        ("data.resident=true", "data.workers=0"),
        ("data.resident=false", "data.workers=0"),
        ("data.resident=false", "data.workers=1"),
        ("data.resident=false", "data.workers=3", "data.prefetch=1"),
    ]
    whole = {digest(trained(tmp_path / str(n), *short, "precision=fp32", *way)) for n, way in enumerate(ways)}
    assert len(whole) == 1


def test_every_session_may_load_in_its_own_way(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", *SMALL, *RICH)
    out = tmp_path / "parts"
    trained(out, *SMALL, *RICH, "limits.steps=7")
    resume_run(out, ["limits.steps=18", "data.resident=false", "data.workers=3"], quiet=True)
    parts = RunDirectory(resume_run(out, [f"limits.steps={STEPS}", "data.workers=0"], quiet=True).directory.path)
    assert digest(parts) == digest(whole)


def test_a_run_before_in_the_same_process_changes_nothing(tmp_path: Path) -> None:
    digests = [
        digest(trained(tmp_path / str(n), *SMALL, f"precision={precision}"))
        for n, precision in enumerate(("bf16", "fp32", "bf16", "fp32"))
    ]
    assert digests[:2] == digests[2:]


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_newest_checkpoint_costs_the_steps_after_the_one_before(tmp_path: Path, damage: str) -> None:
    whole = trained(tmp_path / "whole", *SMALL)
    out = tmp_path / "damaged"
    trained(out, *SMALL, "limits.steps=18")
    assert list(find_checkpoints(out / "checkpoints")) == [16, 18], "16 is the best, by its score"
    state = out / "checkpoints" / "step-00000018" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content if damage == "flipped" else content[:-100])
    repaired = RunDirectory(resume_run(out, [f"limits.steps={STEPS}"], quiet=True).directory.path)
    assert digest(repaired) == digest(whole)
    assert learned(repaired) == learned(whole)
    assert events(repaired, "checkpoint_damaged") == events(repaired, "resumed") == [16]


def test_a_finished_run_can_be_resumed_for_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = trained(out, *SMALL)
    before = digest(done), learned(done), (out / "checkpoints" / "best.json").read_bytes()
    # As after a kill between the last checkpoint and the weights, and between the weights and run.json.
    done.model.unlink()
    done.run_json.write_text(done.run_json.read_text().replace('"done"', '"running"'))
    for _ in range(2):
        resume_run(out, [], quiet=True)
        assert (digest(done), learned(done), (out / "checkpoints" / "best.json").read_bytes()) == before
    assert events(done, "done") == [STEPS] * 3
    assert events(done, "checkpoint").count(STEPS) == 1


def test_training_time_counts_once(tmp_path: Path) -> None:
    parts = trained_in_parts(tmp_path / "parts", [5, 10, 15, 20], *SMALL)
    times = [row.time_s for row in read_rows(parts.metrics)]
    assert times == sorted(times)
    # A row's speed is that of its own steps: their times add up to the whole.
    rows = list(read_rows(parts.metrics))
    steps = [after.step - before for before, after in zip([0, *(row.step for row in rows)], rows, strict=False)]
    seconds = sum(64 * n / row.values["train/images_per_s"] for n, row in zip(steps, rows, strict=True))
    assert seconds == pytest.approx(times[-1], abs=0.001 * len(rows))  # times are rounded to milliseconds


def test_weights_of_an_earlier_end_do_not_outlive_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    early = trained(out, *SMALL, "limits.steps=10")
    assert early.model.exists()
    with pytest.raises(Stopped):
        resume_run(out, [f"limits.steps={STEPS}", "limits.hours=1e-9"], quiet=True)
    assert not early.model.exists(), "they would be taken for the newest"


def test_a_limit_below_what_is_done_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    done = trained(tmp_path / "run", *SMALL)
    before = digest(done), learned(done)
    with pytest.raises(CheckpointError, match="the run has done 24 steps, the recipe ends after 12"):
        resume_run(tmp_path / "run", ["limits.steps=12"], quiet=True)
    assert (digest(RunDirectory(resume_run(tmp_path / "run", [], quiet=True).directory.path)), learned(done)) == before
