"""Observations: reports of updates become rows of the journal. With or without them the weights are the same bits."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

import torch

from opsin.data.base import Batch
from opsin.errors import Diverged
from opsin.reporting.teller import RunTeller
from opsin.training.agenda import Agenda
from opsin.training.alerts import Alerts
from opsin.training.freeze import LayerFreezer, announce_stage
from opsin.training.monitor import CANCELLED, Finding, Monitor, RollBack
from opsin.training.precision import peak_memory_bytes
from opsin.training.state import StepReport, TrainState


class Saves(Protocol):
    """The checkpoints of a run, as far as rows depend on them."""

    def is_due(self, state: TrainState) -> bool:
        """True if the state is about to be saved."""


class Observations:
    """The reader of step reports, in windows: one transfer from the device per window, none per step."""

    def __init__(
        self,
        teller: RunTeller,
        agenda: Agenda,
        *,
        limit: int,
        monitors: Mapping[str, Monitor] = MappingProxyType({}),
        saves: Saves | None = None,
        freezer: LayerFreezer | None = None,
        alerts: Alerts | None = None,
    ) -> None:
        """`limit` cancelled updates in a row end the run; with `alerts` they request a rollback first.

        A row also ends when `saves` is about to save. Stages are reported with the layers that `freezer` freezes.
        """
        self._teller = teller
        self._journal = teller.journal
        self._console = teller.console
        self._agenda = agenda
        self._timeline = agenda.timeline
        self._last_step = agenda.last_step
        self._limit = limit
        self._monitors = monitors
        self._saves = saves
        self._freezer = freezer
        self._alerts = alerts
        self._window: list[StepReport] = []
        self._started = time.perf_counter()
        self._window_s = 0.0
        self._waited_s = 0.0
        self._cancelled_in_a_row = 0

    @contextmanager
    def watch(self, state: TrainState) -> Iterator[None]:
        """Start the clock of training time; after the block, the last window is read."""
        epochs = self._timeline.epoch(self._last_step)
        self._console.start(total_steps=self._last_step, first_step=state.step, total_epochs=epochs)
        # A run that resumes among bad updates may not make more of them than one without interruption.
        self._cancelled_in_a_row = self._journal.streak("step_cancelled", state.step)
        self._note_stage(state)
        self._started = time.perf_counter()
        try:
            yield
        except BaseException:
            with suppress(Diverged, RollBack):  # the exception that ends training is the one to be seen
                self._read_rest(state)
            raise
        self._read_rest(state)

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each arrives counts as waiting for data."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self._waited_s += time.perf_counter() - before
            if batch is None:
                return
            yield batch
            del batch  # its memory, for the next one

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not training time."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    def take(self, state: TrainState, report: StepReport, *, ends: bool = False) -> None:
        """Add an update to the window; write a row at the end of the window, or if `ends`.

        Raises:
            Diverged: too many updates in a row were cancelled.
        """
        now = time.perf_counter()
        state.elapsed_s += now - self._started
        self._window_s += now - self._started
        self._started = now
        measured = self._measure(state, report)
        # No monitor reads the features later: they need not stay in memory.
        self._window.append(replace(report, features={}))
        # A monitor with nothing to look at (no features, say) makes no row.
        saves = self._saves is not None and self._saves.is_due(state)
        if measured or ends or saves or self._agenda.row(state.step):
            self._read(state, measured)
        if (stage := self._agenda.stage_begins(state.step)) is not None:
            self._announce(stage, state.step)

    def _read_rest(self, state: TrainState) -> None:
        if self._window and state.whole:
            self._read(state)

    def _note_stage(self, state: TrainState) -> None:
        """Announce the next stage unless the journal has it: a resume may have changed the stages."""
        if state.step >= self._last_step:
            return
        stage = self._timeline.position(state.step).stage
        known = self._journal.last_event("stage")
        if known is None or known.facts.get("number") != stage:
            self._announce(stage, state.step)

    def _announce(self, stage: int, step: int) -> None:
        if self._freezer is not None:
            announce_stage(self._timeline, self._freezer, self._teller, stage, step)

    def _measure(self, state: TrainState, report: StepReport) -> dict[str, float]:
        values: dict[str, float] = {}
        for name in self._agenda.measurements(report.step):
            values.update(self._monitors[name].measure(state, report))
        return values

    def _read(self, state: TrainState, measured: Mapping[str, float] = MappingProxyType({})) -> None:
        reports, self._window = self._window, []
        last = reports[-1]
        names = list(last.values)
        table = torch.stack([torch.stack([r.applied, *(r.values[name] for name in names)]) for r in reports]).tolist()
        made = [row[1:] for row in table if row[0] > 0]
        values = {name: sum(row[index] for row in made) / len(made) for index, name in enumerate(names) if made}
        if len(made) < len(reports):
            values[CANCELLED] = float(len(reports) - len(made))
        values["train/lr"] = last.scheduled.lr
        values["train/momentum"] = last.scheduled.momentum
        values["train/weight_decay"] = last.scheduled.weight_decay
        values["train/images_per_s"] = sum(r.images for r in reports) / self._window_s
        values.update(self._split_time(reports))
        if (device := last.ids.device).type == "cuda":
            values["gpu/peak_memory_gib"] = peak_memory_bytes(device) / 2**30
        self._window_s = self._waited_s = 0.0
        values.update(measured)
        epoch = self._timeline.epoch(last.step)
        self._journal.log(last.step, epoch, values, time_s=state.elapsed_s)
        self._console.progress(last.step, epoch, values)
        for report, row in zip(reports, table, strict=True):
            self._judge(report, row[0] > 0, dict(zip(names, row[1:], strict=True)), scaled=state.loss_scale is not None)

    def _split_time(self, reports: Sequence[StepReport]) -> dict[str, float]:
        """The time of a mean step by part, in milliseconds.

        In `data` the host waits for a batch. On a GPU it runs ahead: colour and mixing are computed there between two
        steps and are in none of the parts.
        """
        totals = {"data": self._waited_s}
        for report in reports:
            for name, seconds in report.times.seconds().items():
                totals[name] = totals.get(name, 0.0) + seconds
        return {f"time/{name}_ms": 1000 * seconds / len(reports) for name, seconds in totals.items()}

    def _judge(self, report: StepReport, applied: bool, values: Mapping[str, float], *, scaled: bool) -> None:
        if applied:
            self._cancelled_in_a_row = 0
            return
        loss, norm = values["train/loss"], values["train/grad_norm"]
        what = f"loss {loss:g}" if not math.isfinite(loss) else f"gradient norm {norm:g}"
        self._cancelled_in_a_row += 1
        # Under fp16 a gradient that overflows only lowers the loss scale; a bad loss is never normal.
        if self._cancelled_in_a_row == 1 and not (scaled and math.isfinite(loss)):
            self._console.warning(f"step {report.step}: {what}: the update was cancelled; events.jsonl lists them all")
        self._journal.event(
            "step_cancelled", report.step, loss=_readable(loss), grad_norm=_readable(norm), ids=report.ids.tolist()
        )
        if self._cancelled_in_a_row >= self._limit:
            raise self._diverged(what, report.step)

    def _diverged(self, what: str, step: int) -> Diverged:
        # The numbers are those of the streak and not of its window: a resume finds the same.
        since = step - self._cancelled_in_a_row + 1
        text = (
            f"step {step}: {what}, and so were the {self._cancelled_in_a_row - 1} updates before it; "
            f"limits.cancelled_in_a_row allows {self._limit}"
        )
        if self._alerts is not None:
            self._alerts.roll_back("cancelled", Finding("cancelled", text, since), text, found=since + self._limit - 1)
        return Diverged(
            f"{text}. The weights are those of step {since - 1}. Lower optim.lr, set optim.clip_norm, or try "
            "precision=fp32"
        )


def _readable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
