"""The profile of a run: the time of a few steps, by part.

torch's profiler runs from the wait for a batch to the end of its update, for a few steps at a time; then the times are
added up and the recording is freed. It is off while evaluators run, and its own work is not counted as training time.
The weights stay the same bits.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from pydantic import Field
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as Recording

from opsin.data.base import Batch
from opsin.errors import RunError
from opsin.settings.family import Settings
from opsin.storage.files import reason_of
from opsin.storage.teller import Teller
from opsin.training.agenda import Agenda
from opsin.training.loop import Profile
from opsin.training.profile.parts import DATA, STEP, Spread, StepTimes, read_recording, summarise
from opsin.training.profile.report import Operator, TimeBreakdown, top_operators, write_trace
from opsin.training.state import TrainState

_TRACED = 3
"""Steps in the trace, and in the list of operators."""
_AT_ONCE = 10
"""Later steps that are recorded before they are added up."""
_LOST = 0.01
"""Share of kernels that may lack a launch before a warning."""


class ProfileConfig(Settings):
    """A profile of a few steps in `profile/` of the run directory: time by part, top operators, a trace."""

    steps: int = Field(0, ge=0)
    """Number of steps that are profiled, more slowly than others; 0 for no profile."""
    skip: int = Field(10, ge=0)
    """Updates before the profiled ones, counted from the start or the resume."""
    trace: bool = True
    """Write the first three profiled steps to trace.json, for chrome://tracing or ui.perfetto.dev."""


class Pauses(Protocol):
    """The clock of training time."""

    def paused(self) -> AbstractContextManager[None]:
        """Time spent inside is not training time."""


class StepProfile(Profile):
    """The profile that `config` asks for, written into `folder`.

    Time spent while `clock` is paused is not training time.
    """

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path,
        teller: Teller,
        agenda: Agenda,
        clock: Pauses,
        *,
        device: torch.device,
    ) -> None:
        self._config = config
        self._folder = folder
        self._teller = teller
        self._agenda = agenda
        self._clock = clock
        self._device = device
        self._on_device = device.type != "cpu"
        # On a GPU the first step of a recording begins with an empty queue: it is like no other.
        self._warm_up = int(self._on_device)
        self._wanted = 0
        self._recording: Recording | None = None
        self._step: record_function | None = None
        self._recorded: list[tuple[int, int]] = []  # step and images
        self._room = 0
        self._done: list[_Measured] = []
        self._operators: list[Operator] = []
        self._is_written = False

    def over(self, batches: Iterator[Batch], state: TrainState) -> Iterator[Batch]:
        if self._is_written:
            yield from batches
            return
        self._done, self._operators = [], []  # of steps before a rollback
        self._plan(self._agenda.last_step - state.step)
        yield from islice(batches, self._config.skip if self._wanted else 0)
        try:
            while len(self._done) < self._wanted and self._begin_step():
                with record_function(DATA):
                    batch = next(batches)
                self._recorded.append((state.step + 1, len(batch)))
                yield batch
        finally:
            if self._recording is not None or len(self._done) < self._wanted:
                self._give_up()
        yield from batches

    def end_step(self, state: TrainState) -> None:
        if self._step is None:
            return
        self._step.__exit__(None, None, None)
        self._step = None
        is_last = state.step == self._agenda.last_step
        if len(self._recorded) < self._room and not is_last and not self._agenda.scores(state.step):
            return
        self._wait()
        with self._clock.paused(), self._telling():
            self._add_up(self._take())
            if is_last or len(self._done) == self._wanted:
                self._wanted = len(self._done)
                self._write()

    def _plan(self, left: int) -> None:
        asked, skip = self._config.steps, self._config.skip
        self._wanted = max(0, min(asked, left - skip))
        if self._wanted < asked:
            what = f"only the last {self._wanted} are profiled" if self._wanted else "nothing is profiled"
            self._teller.warning(f"profile.steps={asked} after profile.skip={skip}: {left} steps are left: {what}")

    def _begin_step(self) -> bool:
        """Begin to record a step; False if that failed."""
        if self._recording is None:
            self._wait()
            with self._clock.paused(), self._telling():
                self._start()
        if self._recording is not None:
            self._step = record_function(STEP)
            self._step.__enter__()
        return self._recording is not None

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its messages are for its developers
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_device else [])]
        # Without acc_events torch 2.11 to 2.13 drop the events before they are added up.
        recording = Recording(activities=activities, acc_events=True)
        recording.start()
        self._recording = recording
        self._recorded = []
        self._room = self._warm_up + min(self._wanted - len(self._done), _AT_ONCE if self._done else _TRACED)

    def _take(self) -> Recording:
        """Hand over the recording."""
        recording, step = self._recording, self._step
        assert recording is not None
        self._recording = self._step = None
        if step is not None:
            step.__exit__(None, None, None)
        return recording

    def _add_up(self, recording: Recording) -> None:
        """Add the times of the recording; the first one also gives the trace and the operators."""
        recording.stop()
        recorded = read_recording(recording, on_device=self._on_device)
        times = recorded.steps
        if len(times) != len(self._recorded) or any(step.idle == step.total for step in times):
            raise RunError("torch's profiler has not seen every step, or no work of the GPU")
        steps = [_Measured(*known, found) for known, found in zip(self._recorded, times, strict=True)]
        measured = steps[self._warm_up :]
        if measured and not self._done:
            self._operators = top_operators(recording, len(steps), on_device=self._on_device)
            if self._config.trace:
                write_trace(recording, self._folder / "trace.json")
            if recorded.lost > _LOST * recorded.kernels:
                self._teller.warning(
                    f"profile: no launch was recorded for {recorded.lost:,} of {recorded.kernels:,} kernels of the "
                    "GPU: their time counts as idle, so the parts are too short"
                )
        self._done += measured

    def _give_up(self) -> None:
        if self._recording is not None:
            # Where a step has failed, its failure is what matters.
            with suppress(RuntimeError):
                self._take().stop()
        self._teller.warning(
            f"profile: interrupted before {self._wanted} steps were profiled; no split.json, unless training goes on "
            "and they are profiled again"
        )

    def _write(self) -> None:
        if not self._done:
            raise RunError("the run was over before a step could be measured")
        times = [measured.times for measured in self._done]
        breakdown = TimeBreakdown(
            device=str(self._device),
            first_step=self._done[0].step,
            last_step=self._done[-1].step,
            steps=len(times),
            images_per_s=1000 * sum(measured.images for measured in self._done) / sum(each.total for each in times),
            step=Spread.of([each.total for each in times]),
            device_idle=Spread.of([each.idle for each in times]) if self._on_device else None,
            parts=summarise(times),
            operators=self._operators,
        )
        for line in breakdown.lines():
            self._teller.notice(line)
        breakdown.write(self._folder)
        self._is_written = True
        self._teller.notice(f"profile: written to {self._folder}")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Let a failure end the profile and not the training."""
        try:
            yield
        except (OSError, RunError, RuntimeError) as error:
            self._wanted = 0
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            self._teller.warning(f"profile: {self._folder} is not complete: {reason}; training goes on")

    def _wait(self) -> None:
        # Before the clock is paused: the work that the GPU still has is training.
        if self._on_device:
            torch.accelerator.synchronize(self._device)


@dataclass(frozen=True, slots=True)
class _Measured:
    step: int
    images: int
    times: StepTimes
