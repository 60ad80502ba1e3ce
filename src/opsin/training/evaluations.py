"""Evaluations of a run: evaluators run when they are due, and their scores are written."""

from collections.abc import Mapping
from typing import Protocol

from opsin.reporting.teller import RunTeller
from opsin.training.agenda import Agenda
from opsin.training.evaluator import Evaluator, FeatureCache, StepEvaluator
from opsin.training.observe import Observations
from opsin.training.state import TrainState

AVERAGED = "_ema"
"""Suffix of the prefix of a score of the averaged weights."""

_SUMMARY = ("train/loss", "train/top1", "train/images_per_s")
_HIDDEN = ("train/", "loss/", "time/", "collapse/", "system/", "gradients/")


class Best(Protocol):
    """The keeper of the best states."""

    def note_scores(self, state: TrainState, scores: Mapping[str, float]) -> None:
        """Keep the state if its scores are among the best."""


class Evaluations:
    """Runs evaluators when they are due, writes their scores, and marks the best state."""

    def __init__(
        self,
        teller: RunTeller,
        agenda: Agenda,
        evaluators: Mapping[str, Evaluator],
        *,
        observations: Observations,
        best: Best,
        features: FeatureCache | None = None,
    ) -> None:
        """`best` gets the scores before they are written; `features` is shared by the evaluators."""
        self._journal = teller.journal
        self._console = teller.console
        self._agenda = agenda
        self._timeline = agenda.timeline
        self._evaluators = evaluators
        self._observations = observations
        self._best = best
        self._features = features or FeatureCache()

    def run_if_due(self, state: TrainState) -> None:
        """Run the evaluators that are due at this step and have no score yet."""
        with self._observations.paused():
            scores = self._score(state)
            if scores:
                epoch = self._timeline.epoch(state.step)
                # The best state is marked before the score is written: a run killed in between scores again.
                self._best.note_scores(state, scores)
                self._journal.log(state.step, epoch, scores, time_s=state.elapsed_s)
            if self._timeline.ends_epoch(state.step) or scores:
                self._summarise_epoch(state)

    def _score(self, state: TrainState) -> dict[str, float]:
        """Scores of the evaluators that are due and have none in the journal, by full name."""
        known = self._journal.row(state.step)
        wanted = {
            prefix: self._evaluators[prefix]
            for prefix in self._agenda.scores(state.step)
            if not any(name.startswith(f"{prefix}/") for name in known)
        }
        for evaluator in wanted.values():
            if isinstance(evaluator, StepEvaluator):
                evaluator.step = state.step
        averaged: Mapping[str, Mapping[str, float]] = {}
        if state.ema is not None and wanted:
            # First, so that the files of an evaluator end up with those of the weights that train.
            with state.ema.in_place(), self._features.weights_unchanged():
                averaged = {prefix: evaluator.evaluate(state.method) for prefix, evaluator in wanted.items()}
        with self._features.weights_unchanged():
            trained = {prefix: evaluator.evaluate(state.method) for prefix, evaluator in wanted.items()}
        return {
            f"{prefix}{suffix}/{name}": value
            for prefix in wanted
            for suffix, scores in ((AVERAGED, averaged), ("", trained))
            for name, value in scores.get(prefix, {}).items()
        }

    def _summarise_epoch(self, state: TrainState) -> None:
        row = self._journal.row(state.step)
        shown = {name: row[name] for name in row if name in _SUMMARY or not name.startswith(_HIDDEN)}
        scores = [name for name in shown if name.endswith("/top1") and name not in _SUMMARY]
        best = {name: value for name in scores if (value := self._journal.best(name)) is not None}
        epoch = round(self._timeline.epoch(state.step), 2)
        self._console.epoch(epoch, shown, seconds=state.elapsed_s, best=best)
