"""A batch whose loss is not a number changes nothing, is reported by name, and a run of them ends the training."""

import math
from pathlib import Path
from typing import Literal

import pytest

from opsin.commands.main import main
from opsin.export.encoder import write_model
from opsin.methods.base import Batch, Clock, DataFacts, Losses
from opsin.methods.supervised import Supervised, SupervisedConfig
from opsin.nn.backbone import ModelConfig
from opsin.reporting.console import open_console
from opsin.reporting.journal import Journal, read_events, read_rows
from opsin.reporting.teller import RunTeller
from opsin.run.assemble import assemble
from opsin.run.parts import build_parts
from opsin.run.recipe import read
from opsin.storage.directory import RunDirectory
from opsin.training.step import train_step
from tests.digits_run import BROKEN_UP, CONVNET, VIT
from tests.story import Calm

pytestmark = pytest.mark.usefixtures("torch_switches")

BAD = 7
STEPS = 14
SHORT = (*BROKEN_UP, f"limits.steps={STEPS}", "method.name=unlucky")


class UnluckyConfig(SupervisedConfig):
    """Supervised, but for some steps."""

    name: Literal["unlucky"] = "unlucky"  # type: ignore[assignment]  # a member of its own
    bad_from: int = 10**9
    bad_to: int = 10**9

    def build(self, model: ModelConfig, facts: DataFacts) -> "Unlucky":
        return Unlucky(self, model, facts)


class Unlucky(Supervised):
    config: UnluckyConfig

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        losses = super().forward(batch, clock)
        if self.config.bad_from <= clock.step < self.config.bad_to:
            return Losses(losses.total * math.nan, losses.parts, losses.measures)
        return losses


def skipping(folder: Path, *overrides: str) -> tuple[bytes, list[int]]:
    """The weights of a run that leaves one batch out, in a loop of its own; and the ids of that batch."""
    folder.mkdir()
    teller = RunTeller(Journal(folder, teller=Calm()), open_console(quiet=True))
    run = assemble(build_parts(read("quickstart", overrides), teller), RunDirectory(folder), teller)
    state = run.start.fresh()
    skipped: list[int] = []
    for batch in run.data.batches(0, STEPS):
        if state.step == BAD:
            skipped = batch.ids.tolist()
            state.step += 1
        else:
            train_step(state, batch, run.plan)
    write_model(folder / "model.safetensors", state.method)
    return (folder / "model.safetensors").read_bytes(), skipped


@pytest.mark.parametrize(
    "overrides",
    [
        (*VIT, "precision=fp32"),
        (*VIT, "precision=bf16", "optim.name=sgd"),
        (*CONVNET, "precision=fp32", "optim.name=sgd"),
        (*CONVNET, "precision=bf16", "optim.name=muon"),
    ],
    ids=["vit fp32 adamw", "vit bf16 sgd", "convnet fp32 sgd", "convnet bf16 muon"],
)
def test_a_bad_batch_leaves_the_weights_as_if_it_had_been_skipped(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    out = tmp_path / "run"
    bad = (f"method.bad_from={BAD}", f"method.bad_to={BAD + 1}")
    assert main(["train", "quickstart", *SHORT, *overrides, *bad, "--quiet", "--out", str(out)]) == 0
    weights, skipped = skipping(tmp_path / "plain", *SHORT, *overrides)
    assert (out / "model.safetensors").read_bytes() == weights
    (event,) = (event for event in read_events(out / "events.jsonl") if event.kind == "step_cancelled")
    assert event.step == BAD + 1, "steps are counted from one"
    assert event.facts["loss"] == "nan"
    assert event.facts["ids"] == skipped
    # Nor does it spoil the means of the window it lies in.
    assert all(math.isfinite(value) for row in read_rows(out / "metrics.jsonl") for value in row.values.values())


def test_bad_batches_without_end_end_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    bad = ("method.bad_from=6", "method.bad_to=1000", "limits.cancelled_in_a_row=5")
    arguments = ["train", "quickstart", *SHORT, *VIT, *bad, "--quiet", "--out", str(out)]
    assert main(arguments) == 4
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("opsin: step 11: loss nan, and so were the 4 updates before it;")
    assert "The weights are those of step 6." in said
    assert not (out / "model.safetensors").exists()
    # Going on from the checkpoint of step 10 counts on where it was.
    assert main(arguments) == 4
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("opsin: step 11: loss nan, and so were the 4 updates before it;")
