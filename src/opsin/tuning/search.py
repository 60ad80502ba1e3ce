"""Successive halving over run directories (`opsin sweep`): many short trainings, of which the best go on.

Each trial is a run with schedules of its whole length that is stopped early (`limits.steps`). A trial that is promoted
goes on from its checkpoint, so that the last rung holds runs that are equal to undisturbed ones. Jamieson and Talwalkar
2016, "Non-stochastic best arm identification and hyperparameter optimization", section 2.

FOLDER/
├── sweep.json                the question and all results
├── recipes/000.yaml          the recipe of each trial
├── 000-lr=0.001-depth=4/     its run directory
└── tuned.yaml                the recipe with the best keys, once all is done
"""

import math
import random
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, Protocol

from opsin.errors import ConfigError, RunError, TrainingError
from opsin.reporting.journal import read_rows
from opsin.run.images import Images, open_images
from opsin.run.recipe import Recipe, fingerprint, read
from opsin.run.tuned import TUNED, WAY_OUT, tuned_recipe
from opsin.settings.text import to_yaml
from opsin.storage.directory import RunDirectory
from opsin.storage.files import write_atomic, writing
from opsin.storage.lock import RunLock
from opsin.storage.records import RecordFormat
from opsin.storage.table import aligned
from opsin.storage.teller import Silence, Teller
from opsin.training.stages import plan_time

RESULT = "sweep.json"
_MOST_TRIALS = 1000
_LONGEST_NAME = 80
_SHOWN = 120


@dataclass(frozen=True, slots=True)
class Grid:
    """The question: a recipe, the keys with several values, and the score that decides."""

    recipe: str
    overrides: tuple[str, ...]
    """Keys with one value."""
    values: dict[str, tuple[str, ...]]
    """Keys with several values, as text."""
    metric: str
    mode: Literal["max", "min"]
    eta: int
    """Share of the trials that is promoted, as its inverse; each rung is as many times as long as the one before."""
    count: int | None = None
    """Number of trials that are drawn at random; None takes all combinations."""


@dataclass(slots=True)
class Trial:
    """A combination of values, and what came of it."""

    name: str
    keys: dict[str, str]
    steps: int = 0
    """Updates of the whole run."""
    recipe: str = ""
    """A hash of its recipe."""
    fault: str = ""
    scores: dict[int, float] = field(default_factory=dict)
    """The score at the end of each rung, by the number of the rung."""

    @property
    def overrides(self) -> list[str]:
        """The keys as arguments."""
        return [f"{key}={text}" for key, text in self.keys.items()]


@dataclass(frozen=True, slots=True)
class _Stored:
    """The content of `sweep.json`."""

    grid: Grid
    trials: tuple[Trial, ...]


_FILE = RecordFormat(_Stored, indent=2)


class Trainer(Protocol):
    """Trains runs."""

    def train(self, recipe: Path, out: Path, overrides: Sequence[str]) -> str:
        """Train `recipe` in `out`, or go on there, with changed keys; return the reason of a failure, else nothing.

        Raises:
            Stopped: the training was stopped; its state is saved.
        """
        ...


def read_grid(recipe: str, texts: Sequence[str], *, metric: str, mode: str, eta: int, count: int | None) -> Grid:
    """Return the question that arguments ask; a key with commas has several values, outside of brackets and quotes.

    Raises:
        ConfigError: no key has several values, or a number is out of its range.
    """
    pairs = [text.partition("=") for text in texts]
    several = {key: _split(value) for key, _, value in pairs if len(_split(value)) > 1}
    faults = []
    if not several:
        faults.append("no key has several values; give one with commas, such as optim.lr=0.001,0.003,0.01")
    faults += [f"{key}: {value!r} twice" for key, found in several.items() for value in _twice(found)]
    faults += [f"{key}: has an empty value; write null for none" for key, found in several.items() if "" in found]
    if eta < 2:
        faults.append(f"--eta {eta}: must be at least 2; use 3")
    if count is not None and count < 2:
        faults.append(f"--runs {count}: must be at least 2")
    combinations = math.prod(map(len, several.values()))
    if min(combinations, count or combinations) > _MOST_TRIALS:
        faults.append(f"{combinations:,} combinations are more than {_MOST_TRIALS:,} runs; draw some with --runs 27")
    if faults:
        raise ConfigError(*(f"command line: {fault}" for fault in faults))
    single = tuple(text for text, (key, _, _) in zip(texts, pairs, strict=True) if key not in several)
    lower = mode == "min" or (mode == "auto" and "loss" in metric)
    return Grid(recipe, single, several, metric, "min" if lower else "max", eta, count)


class Search:
    """The trials of a grid in a folder, and how far each has come."""

    def __init__(self, grid: Grid, folder: Path) -> None:
        """Read every recipe, and the results of an earlier session.

        Raises:
            ConfigError: no combination is a recipe that fits its data, or no evaluator gives the metric.
            DataError: the images cannot be used.
            RunError: the folder holds something else.
        """
        self.grid = grid
        self.folder = folder
        self.trials = list(_trials(grid))
        self._recipes: dict[str, Recipe] = {}
        self._read_recipes()
        self.rungs = 1 + int(math.log(len(self.trials)) / math.log(grid.eta) + 1e-9)
        self._take_over()

    def run(self, trainer: Trainer, teller: Teller) -> None:
        """Train what is not trained yet, rung by rung.

        Raises:
            ConfigError: a run has no such metric.
            RunError: the folder cannot be written.
            Stopped: a training was stopped; the same search goes on from there.
            TrainingError: no run came to an end.
        """
        with writing(self.folder, WAY_OUT):
            (self.folder / "recipes").mkdir(parents=True, exist_ok=True)
            lock = RunLock(self.folder / ".lock")
            lock.take()
            for trial in self.trials:
                if trial.name in self._recipes:
                    text = to_yaml(self._recipes[trial.name], comments=False)
                    write_atomic(self._recipe_of(trial), text.encode())
        for rung in range(self.rungs):
            while waiting := [trial for trial in self._promoted(rung) if rung not in trial.scores]:
                trial = waiting[0]
                where = f"rung {rung + 1} of {self.rungs}, {len(waiting)} to go"
                teller.notice(f"{where}: {trial.name} to step {self._steps(trial, rung)} of {trial.steps}")
                self._advance(trial, rung, trainer)
                self._save()
        if self.best is None:
            raise TrainingError(f"{self.folder}: no run came to an end: {self.trials[0].fault}")
        grid, reason = self.grid, f"by opsin sweep: {self.grid.metric} {self.best.scores[self.rungs - 1]:.4g}"
        text = tuned_recipe(grid.recipe, [*grid.overrides, *self.best.overrides], {}, reason)
        with writing(self.folder, WAY_OUT):
            write_atomic(self.folder / TUNED, text.encode())

    @property
    def best(self) -> Trial | None:
        """The best trial of the last rung; None until that is done."""
        rung = self.rungs - 1
        last = self._ranked(self._promoted(rung), rung)
        return last[0] if last and all(rung in trial.scores for trial in last) else None

    def as_dict(self) -> dict[str, object]:
        """The same as plain values."""
        best = None if self.best is None else self.best.name
        return {**asdict(self.grid), "trials": [asdict(trial) for trial in self.trials], "best": best}

    def lines(self) -> list[str]:
        """All runs, the best first, and the command that trains the best again."""
        grid = self.grid
        shares = [f"{float(grid.eta) ** (rung + 1 - self.rungs):.3g}" for rung in range(self.rungs)]
        rows = [("run", *grid.values, *shares)]
        order = sorted(self._ranked(self.trials), key=lambda trial: -len(trial.scores))
        for trial in order:
            scores = [f"{trial.scores[rung]:.4f}" if rung in trial.scores else "-" for rung in range(self.rungs)]
            rows.append((trial.name, *trial.keys.values(), *scores))
        ends = ["", *(trial.fault[:_SHOWN] or ("<- best" if trial is self.best else "") for trial in order)]
        table = [f"{line}  {end}".rstrip() for line, end in zip(aligned(rows, 1), ends, strict=True)]
        head = f"{grid.metric} ({grid.mode} is best), by the share of the run that was trained:"
        if self.best is None:
            return [head, *table, "stopped before the end; the same command goes on"]
        command = shlex.join(["opsin", "train", grid.recipe, *grid.overrides, *self.best.overrides])
        return [head, *table, f"best: {self.folder / self.best.name} (trained to its end)", f"again: {command}"]

    def _advance(self, trial: Trial, rung: int, trainer: Trainer) -> None:
        out, steps = self.folder / trial.name, self._steps(trial, rung)
        # The last rung is the whole run: it is to be equal to one without a search.
        limit = self._recipes[trial.name].limits.steps if rung == self.rungs - 1 else steps
        fault = trainer.train(self._recipe_of(trial), out, [f"limits.steps={'null' if limit is None else limit}"])
        row = next((row for row in read_rows(RunDirectory(out).metrics) if row.step == steps), None)
        if fault:
            trial.fault = fault
        elif row is None:
            trial.fault = f"its journal has no row of step {steps}"
        elif self.grid.metric not in row.values:
            scores = sorted(name for name in row.values if not name.startswith(("time/", "system/")))
            raise ConfigError(
                f"command line: --metric {self.grid.metric}: this run has no such score; it has {', '.join(scores)}"
            )
        elif not math.isfinite(row.values[self.grid.metric]):
            trial.fault = f"{self.grid.metric} is not finite"
        else:
            trial.scores[rung] = row.values[self.grid.metric]

    def _promoted(self, rung: int) -> list[Trial]:
        """The trials of a rung: all in the first, then the best of the one before. Others replace one that fails."""
        trials = [trial for trial in self.trials if not trial.fault]
        for earlier in range(rung):
            ranked = self._ranked([trial for trial in trials if earlier in trial.scores], earlier)
            trials = ranked[: max(1, len(self.trials) // self.grid.eta ** (earlier + 1))]
        return trials

    def _ranked(self, trials: Sequence[Trial], rung: int | None = None) -> list[Trial]:
        """The trials by their score in a rung, or their newest, the best first; those without one are last."""
        sign = -1 if self.grid.mode == "max" else 1

        def key(trial: Trial) -> tuple[bool, float]:
            score = trial.scores.get(max(trial.scores, default=0) if rung is None else rung)
            return score is None, 0.0 if score is None else sign * score

        return sorted(trials, key=key)

    def _steps(self, trial: Trial, rung: int) -> int:
        return max(1, math.ceil(trial.steps / float(self.grid.eta) ** (self.rungs - 1 - rung)))

    def _recipe_of(self, trial: Trial) -> Path:
        return self.folder / "recipes" / f"{trial.name.partition('-')[0]}.yaml"

    def _read_recipes(self) -> None:
        """Read the recipe of each trial, and count its steps; a recipe that is wrong is a fault of its trial."""
        opened: dict[str, Images] = {}
        for trial in self.trials:
            try:
                recipe = read(self.grid.recipe, [*self.grid.overrides, *trial.overrides])
                key = recipe.data.model_dump_json()
                if key not in opened:
                    opened[key] = open_images(recipe, Silence())
                total = plan_time(recipe, opened[key].train, Silence()).total_steps
                self._check_metric(recipe)
            except ConfigError as error:
                trial.fault = error.faults[0]
                if trial is self.trials[-1] and not self._recipes:
                    raise
                continue
            trial.steps, trial.recipe = min(total, recipe.limits.steps or total), fingerprint(recipe)
            self._recipes[trial.name] = recipe

    def _check_metric(self, recipe: Recipe) -> None:
        prefix, metric = self.grid.metric.partition("/")[0], self.grid.metric
        if prefix not in ("train", *recipe.evaluators) or "/" not in metric:
            known = ", ".join(f"{name}/..." for name in recipe.evaluators) or "none"
            raise ConfigError(
                f"command line: --metric {metric}: is no score of an evaluator here; the recipe has {known}; add one, "
                "such as evaluators.knn.name=knn"
            )

    def _take_over(self) -> None:
        """Take the results of an earlier session of the same question."""
        if not self.folder.exists() or not any(item.name[0] != "." for item in self.folder.iterdir()):
            return
        try:
            stored = _FILE.read(self.folder / RESULT, "choose another folder with --out")
        except FileNotFoundError:
            raise RunError(f"{self.folder}: holds other files; choose an empty or a new folder with --out") from None
        known = {trial.name: trial for trial in stored.trials}
        if stored.grid != self.grid or any(
            trial.recipe != known[trial.name].recipe for trial in self.trials if trial.name in known
        ):
            raise RunError(
                f"{self.folder}: holds a sweep of other keys or of another recipe; choose another folder with --out"
            )
        for trial in self.trials:
            # A run that was removed is made again.
            if RunDirectory(self.folder / trial.name).exists():
                trial.scores, trial.fault = dict(known[trial.name].scores), known[trial.name].fault

    def _save(self) -> None:
        with writing(self.folder, WAY_OUT):
            _FILE.write(self.folder / RESULT, _Stored(self.grid, tuple(self.trials)))


def _trials(grid: Grid) -> Iterator[Trial]:
    combinations = list(product(*grid.values.values()))
    if grid.count is not None and grid.count < len(combinations):
        drawn = sorted(random.Random(0).sample(range(len(combinations)), grid.count))
        combinations = [combinations[index] for index in drawn]
    for number, values in enumerate(combinations):
        keys = dict(zip(grid.values, values, strict=True))
        words = "-".join(f"{key.rpartition('.')[2]}={text}" for key, text in keys.items())
        plain = "".join(char if char.isalnum() or char in "=.-_+" else "_" for char in words)
        yield Trial(f"{number:03}-{plain}"[:_LONGEST_NAME], keys)


def _split(text: str) -> tuple[str, ...]:
    """The values between commas that are not inside of brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        if char == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return tuple(part.strip() for part in parts)


def _twice(values: Sequence[str]) -> list[str]:
    return [value for value in dict.fromkeys(values) if values.count(value) > 1]
