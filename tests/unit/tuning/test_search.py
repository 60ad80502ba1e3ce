"""A sweep over keys: the best of each rung go on from their checkpoints, and a stopped sweep goes on where it was."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from opsin.errors import ConfigError, OpsinError, RunError, Stopped, TrainingError
from opsin.run.recipe import read
from opsin.run.session import resume_run, train_recipe
from opsin.storage.directory import RunDirectory
from opsin.storage.teller import Silence
from opsin.training.checkpoints.format import find_checkpoints
from opsin.tuning.search import Grid, Search, Trial, read_grid
from tests.digits_run import OVERRIDES, SMALL_VIT, STEPS_PER_EPOCH

KEYS = (*OVERRIDES, *SMALL_VIT, "epochs=3", "checkpoints.every=never", "evaluators.val.every=3 epochs")
METRIC = "val/top1"


def grid(*keys: str, metric: str = METRIC, mode: str = "auto", eta: int = 3, count: int | None = None) -> Grid:
    return read_grid("quickstart", [*KEYS, *keys], metric=metric, mode=mode, eta=eta, count=count)


class InThisProcess:
    """A trainer without processes. It stops before training number `stops`, and lets runs named in `breaks` fail."""

    def __init__(self, *, stops: int | None = None, breaks: Sequence[str] = ()) -> None:
        self.done: list[tuple[str, str]] = []
        self._stops = stops
        self._breaks = breaks

    def train(self, recipe: Path, out: Path, overrides: Sequence[str]) -> str:
        if len(self.done) == self._stops:
            raise Stopped("SIGTERM")
        self.done.append((out.name, overrides[0]))
        try:
            if find_checkpoints(out / "checkpoints"):
                resume_run(out, overrides, quiet=True)
            else:
                train_recipe(read(str(recipe), overrides), out, name="quickstart", quiet=True)
        except OpsinError as error:
            return str(error)
        return "it broke" if out.name[:3] in self._breaks else ""


def best_of(search: Search) -> Trial:
    """The trial with the highest score in the first rung; the first of several."""
    return max(search.trials, key=lambda trial: trial.scores[0])


def test_the_best_goes_on_to_the_bytes_of_a_run_without_a_sweep(tmp_path: Path) -> None:
    search = Search(grid("optim.lr=0.00001,0.01,0.002"), tmp_path / "sweep")
    trainer = InThisProcess()
    search.run(trainer, Silence())
    winner = best_of(search)
    steps = f"limits.steps={STEPS_PER_EPOCH}"
    assert trainer.done == [*((trial.name, steps) for trial in search.trials), (winner.name, "limits.steps=null")]
    assert search.best is winner
    assert [len(trial.scores) for trial in search.trials if trial is not winner] == [1, 1]
    assert len(winner.scores) == 2
    tuned = read(str(tmp_path / "sweep" / "tuned.yaml"))
    assert tuned == read("quickstart", [*KEYS, *winner.overrides])
    train_recipe(tuned, tmp_path / "alone", name="quickstart", quiet=True)
    swept = RunDirectory(tmp_path / "sweep" / winner.name)
    assert swept.model.read_bytes() == RunDirectory(tmp_path / "alone").model.read_bytes()
    table = search.lines()
    assert table[2].startswith(winner.name)
    assert table[2].endswith("<- best")
    assert table[-1].endswith(winner.overrides[0])


def test_a_stopped_sweep_goes_on_and_a_finished_one_trains_nothing(tmp_path: Path) -> None:
    question = grid("optim.lr=0.00001,0.01,0.002", "epochs=1")
    with pytest.raises(Stopped):
        Search(question, tmp_path).run(InThisProcess(stops=2), Silence())
    assert not (tmp_path / "tuned.yaml").exists()
    rest, none = InThisProcess(), InThisProcess()
    search = Search(question, tmp_path)
    assert search.best is None
    assert "goes on" in search.lines()[-1]
    search.run(rest, Silence())
    assert [run for run, _ in rest.done] == ["002-lr=0.002", best_of(search).name]
    again = Search(question, tmp_path)
    again.run(none, Silence())
    assert none.done == []
    assert again.lines() == search.lines()
    for other in (grid("optim.lr=0.00001,0.01", "epochs=1"), grid("optim.lr=0.00001,0.01,0.002", "epochs=2")):
        with pytest.raises(RunError, match="another recipe"):
            Search(other, tmp_path)


def test_failed_runs_are_rows_and_the_next_best_takes_over(tmp_path: Path) -> None:
    search = Search(grid("optim.lr=0.00001,0.01", "model.width=15,16", "epochs=1", eta=2), tmp_path)
    assert [bool(trial.fault) for trial in search.trials] == [True, False, True, False]
    assert search.rungs == 3
    search.run(InThisProcess(breaks=["003"]), Silence())
    assert search.best is search.trials[1]
    assert search.trials[3].fault == "it broke"
    assert [line for line in search.lines() if "width 15" in line and "heads 2" in line]
    with pytest.raises(TrainingError, match="no run came to an end: it broke"):
        Search(grid("optim.lr=1,2", "epochs=1"), tmp_path / "none").run(InThisProcess(breaks=["000", "001"]), Silence())


def test_the_metric_is_one_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no score of an evaluator here; the recipe has val/"):
        Search(grid("optim.lr=1,2", metric="knn/top1"), tmp_path)
    with pytest.raises(ConfigError, match="this run has no such score; it has "):
        Search(grid("optim.lr=1,2", "epochs=1", metric="val/top3"), tmp_path).run(InThisProcess(), Silence())


def test_values_are_split_at_commas_outside_of_brackets() -> None:
    question = grid("model.widths=[8,8],[16,16]", 'data.path="a,b"', "optim={name: sgd, lr: 0.1}", "seed=1,2")
    assert question.values == {"model.widths": ("[8,8]", "[16,16]"), "seed": ("1", "2")}
    assert question.overrides == (*KEYS, 'data.path="a,b"', "optim={name: sgd, lr: 0.1}")


@pytest.mark.parametrize(
    ("metric", "mode", "best"),
    [("val/top1", "auto", "max"), ("val/loss", "auto", "min"), ("val/loss", "max", "max"), ("x/error", "min", "min")],
)
def test_a_loss_is_best_when_it_is_low(metric: str, mode: str, best: str) -> None:
    assert grid("seed=1,2", metric=metric, mode=mode).mode == best


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("seed=1",), "no key has several values"),
        (("seed=1,1",), "seed: '1' twice"),
        (("seed=1,",), "seed: has an empty value"),
        (tuple(f"evaluators.e{n}.k=1,2" for n in range(10)), "1,024 combinations are more than 1,000 runs"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_question_without_sense_is_refused(keys: Sequence[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        grid(*keys)


def test_some_combinations_are_drawn_alike_each_time() -> None:
    question = grid("seed=1,2,3,4", "optim.lr=0.1,0.2,0.3,0.4", count=5)
    first, second = (Search(question, Path(os.devnull).parent / "no-such-folder") for _ in range(2))
    assert len(first.trials) == 5
    assert [trial.keys for trial in first.trials] == [trial.keys for trial in second.trials]
