"""The journal of a run: its measurements, its events, and the best of its scores.

`metrics.jsonl` is the truth: one JSON object per line with `step`, `epoch`, `time_s`, then the
values sorted by name. No step has two lines. `events.jsonl` holds the events, `summary.json` the
last and best of every score. CSV, TensorBoard and plain text are sinks: copies that may fail.

A value that is not finite is written as null and read back as NaN.
"""

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

from opsin.errors import LockLost, RunError
from opsin.reporting.lines import LineFile, encode, finite, parse_line, read_lines
from opsin.reporting.outlets import Outlet
from opsin.storage.files import sync, write_atomic
from opsin.storage.teller import Fact, Owner, Teller

_POSITION = ("step", "epoch", "time_s")
_HIGHER = ("top1", "top5", "accuracy")
_LOWER = ("loss",)


@dataclass(frozen=True, slots=True)
class Row:
    """Values measured after `step` updates. `epoch` has a fraction, `time_s` is training time in seconds."""

    step: int
    epoch: float
    time_s: float
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Event:
    """An event after `step` updates, at an ISO 8601 time (UTC)."""

    time: str
    step: int
    kind: str
    facts: Mapping[str, Fact]


class Sink:
    """A copy of the journal in another form. A subclass implements what it needs.

    Each method may raise: the journal keeps the call, warns once, and makes the call again.
    """

    name: ClassVar[str]
    """The file or folder that it writes, for warnings; `log.csv`, say."""
    package: ClassVar[str | None] = None
    """A package that it needs and that may be missing."""
    in_every_run: ClassVar[bool] = False
    """True adds the sink to each run of a process that has imported the class."""

    def __init__(self, folder: Path, teller: Teller) -> None:
        """`folder` is the run directory; `teller` reports faults that no method raises."""
        self.folder = folder
        self.teller = teller

    def write(self, row: Row) -> None:
        """Add new values. A second row for the same step adds to the first."""

    def event(self, event: Event) -> None:
        """Add an event."""

    def rewind(self, step: int) -> None:
        """Forget everything after `step`; `metrics.jsonl` has forgotten it already."""

    def catch_up(self, step: int) -> None:
        """Add missing rows up to `step` from `metrics.jsonl`: more calls failed than are kept."""
        self.rewind(step)

    def close(self) -> None:
        """Finish: nothing more will come."""

    def abandon(self) -> None:
        """End threads and processes and write nothing: the run is another process's."""


class Journal:
    """Writes the history of a run, in any thread. Once it is open, no fault of a file stops training.

    Entries that cannot be written (on a full disk, say) wait in memory until they can; the first fault
    of each file or sink is a warning, each recovery an event. Of each, the newest 10,000 entries are
    kept; sinks add those that they lost from `metrics.jsonl`.
    """

    def __init__(
        self,
        folder: Path,
        sinks: Sequence[Sink] = (),
        *,
        teller: Teller,
        owner: Owner | None = None,
    ) -> None:
        """`teller` reports files that cannot be written. Nothing is written once `owner` has lost its lock."""
        self._folder = folder
        self._owner = owner
        self._teller = teller
        self._metrics_file = LineFile(folder / "metrics.jsonl", _is_row)
        self._events_file = LineFile(folder / "events.jsonl", _is_event)
        self._metrics = Outlet("metrics.jsonl", teller)
        self._events = Outlet("events.jsonl", teller)
        self._summary = Outlet("summary.json", teller)
        self._sinks = [(Outlet(sink.name, teller, make_good=partial(self._catch_up, sink)), sink) for sink in sinks]
        self._last: Row | None = None
        self._scores: dict[str, _Score] = {}
        self._lock = threading.RLock()
        self._sync_failed = False
        self._load()

    def log(self, step: int, epoch: float, values: Mapping[str, float], *, time_s: float) -> None:
        """Write values; those of the last step are added to its row.

        Raises:
            LockLost: the run is another process's.
        """
        self._check_held()
        with self._lock:
            last_step = -1 if self._last is None else self._last.step
            assert step >= last_step, f"step {step} is logged after step {last_step}"
            self._last = row = Row(step, epoch, time_s, {**self.row(step), **values})
            self._note(step, values)
            self._metrics.put(partial(self._metrics_file.write, _row_line(row), step=step), step=step)
            for outlet, sink in self._sinks:
                outlet.put(partial(sink.write, Row(step, epoch, time_s, dict(values))))
            self._tell_recoveries(step)

    def event(self, kind: str, step: int, **facts: Fact) -> None:
        """Record an event after `step` updates, unless the run is another process's."""
        if not self._is_ours():
            return
        with self._lock:
            event = Event(datetime.now(UTC).isoformat(timespec="milliseconds"), step, kind, facts)
            line = encode({"time": event.time, "step": step, "kind": kind, **facts})
            self._events.put(partial(self._events_file.write, line), step=step)
            for outlet, sink in self._sinks:
                outlet.put(partial(sink.event, event))
            self._tell_recoveries(step)

    def row(self, step: int) -> Mapping[str, float]:
        """The values of `step` if it is the last one logged, else none."""
        return self._last.values if self._last is not None and self._last.step == step else {}

    @property
    def last(self) -> Row | None:
        """The newest row; None before the first."""
        return self._last

    def rows(self) -> list[Row]:
        """All rows on disk, oldest first."""
        return list(read_rows(self._folder / "metrics.jsonl"))

    def best(self, name: str) -> float | None:
        """The best value of a score so far: the lowest loss, the highest accuracy; None before the first."""
        score = self._scores.get(name)
        return None if score is None else score.best

    def history(self, name: str) -> Mapping[int, float]:
        """The recorded values of a score, by step."""
        return {row.step: row.values[name] for row in self.rows() if name in row.values}

    def streak(self, kind: str, step: int) -> int:
        """Number of consecutive steps up to `step` that have an event of this kind on disk."""
        steps = {event.step for event in self.events(kind)}
        return next(length for length in count() if step - length not in steps)

    def last_event(self, kind: str) -> Event | None:
        """The newest event of this kind on disk."""
        return next(reversed(self.events(kind)), None)

    def events(self, kind: str) -> list[Event]:
        """The events of this kind on disk, oldest first."""
        return [event for event in read_events(self._folder / "events.jsonl") if event.kind == kind]

    def rewind(self, step: int) -> None:
        """Forget every row and event after `step`, and any torn line, in one replacement per file.

        Raises:
            RunError: a file cannot be rewritten.
            LockLost: the run is another process's.
        """
        self._check_held()
        with self._lock:
            # Otherwise waiting calls would write after the rewind, and steps would have two rows.
            self._metrics.rewind(step)
            self._events.rewind(step)
            try:
                self._metrics_file.rewind(step)
                self._events_file.rewind(step)
            except OSError as error:
                raise RunError(f"{self._folder}: cannot rewind the log to step {step}: {error}") from error
            self._load()
            for outlet, sink in self._sinks:
                outlet.put(partial(sink.rewind, step))

    def sync(self) -> None:
        """Make the content of the files survive a power cut, in any thread; the first fault is a warning.

        Called before a checkpoint is valid: a run that resumes from it does not repeat earlier rows and events.
        """
        try:
            for name in ("metrics.jsonl", "events.jsonl"):
                with suppress(FileNotFoundError):  # nothing was written yet
                    sync(self._folder / name)
            sync(self._folder)
        except OSError as error:
            if not self._sync_failed:
                self._sync_failed = True
                self._teller.warning(f"{self._folder}: a power cut may cost rows of the log: {error.strerror or error}")

    def summarize(self, *, steps: int, seconds: float, peak_memory_bytes: int | None = None) -> None:
        """Replace `summary.json`: last and best of every score, steps, seconds, peak memory."""
        if not self._is_ours():
            return
        with self._lock:
            scores: dict[str, Fact] = {name: self._scores[name].facts() for name in sorted(self._scores)}
            facts: dict[str, Fact] = {
                "steps": steps,
                "seconds": round(seconds, 3),
                "peak_memory_bytes": peak_memory_bytes,
                "scores": scores,
            }
            text = json.dumps(finite(facts), indent=2, allow_nan=False) + "\n"
            self._summary.drop()
            self._summary.put(partial(write_atomic, self._folder / "summary.json", text.encode()))
            self._tell_recoveries(steps)

    def close(self) -> None:
        """Make the waiting calls and close the sinks; entries that cannot be written now are lost, with a warning.

        Events that come later go to `events.jsonl` alone. Nothing is written if the run is another process's.
        """
        with self._lock:
            is_ours = self._is_ours()
            for outlet in () if is_ours else self._outlets():
                outlet.drop()
            for outlet, sink in self._sinks:
                outlet.put(partial(sink.close if is_ours else sink.abandon))
            for outlet in self._outlets():
                outlet.give_up()
            self._sinks = []

    def _check_held(self) -> None:
        if self._owner is not None:
            self._owner.check_held()

    def _is_ours(self) -> bool:
        try:
            self._check_held()
        except LockLost:
            return False
        return True

    def _outlets(self) -> list[Outlet]:
        return [self._metrics, self._events, self._summary, *(outlet for outlet, _ in self._sinks)]

    def _load(self) -> None:
        self._last = None
        self._scores.clear()
        for row in self.rows():
            self._last = row
            self._note(row.step, row.values)

    def _note(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            assert name not in _POSITION, f"{name} is the position of a row, not a value"
            self._scores[name] = _Score.after(self._scores.get(name), name, step, value)

    def _catch_up(self, sink: Sink) -> None:
        if self._last is not None:
            sink.catch_up(self._last.step)

    def _tell_recoveries(self, step: int) -> None:
        for outlet in self._outlets():
            if outlet.state == "recovered":
                outlet.state = "well"
                lost, outlet.lost = outlet.lost, 0
                self.event("log_recovered", step, log=outlet.name, **({"lost": lost} if lost else {}))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a `metrics.jsonl`, oldest first; none if there is no file. Torn and damaged lines are skipped."""
    return (_as_row(item) for _, item in read_lines(path, _is_row))


def parse_row(line: bytes) -> Row | None:
    """The row of a line of `metrics.jsonl`; None if it is torn or damaged."""
    item = parse_line(line, _is_row)
    return None if item is None else _as_row(item)


def _as_row(item: Mapping[str, Any]) -> Row:
    values = {name: math.nan if value is None else value for name, value in item.items() if name not in _POSITION}
    return Row(item["step"], item["epoch"], item["time_s"], values)


def read_events(path: Path) -> Iterator[Event]:
    """The events of an `events.jsonl`, oldest first; none if there is no file. Torn and damaged lines are skipped."""
    for _, item in read_lines(path, _is_event):
        facts = {name: value for name, value in item.items() if name not in ("time", "step", "kind")}
        yield Event(item["time"], item["step"], item["kind"], facts)


@dataclass(frozen=True, slots=True)
class _Score:
    """The history of one value. `best` is None if the name has no better direction, or nothing was finite."""

    last: float
    best: float | None
    best_step: int | None

    @classmethod
    def after(cls, before: "_Score | None", name: str, step: int, value: float) -> "_Score":
        kind = name.rpartition("/")[2]
        sign = 1.0 if kind in _HIGHER else -1.0 if kind in _LOWER else math.nan
        best, best_step = (before.best, before.best_step) if before else (None, None)
        # Every comparison with NaN is false: a value without direction never becomes the best.
        if math.isfinite(value) and sign * value > (-math.inf if best is None else sign * best):
            best, best_step = value, step
        return cls(value, best, best_step)

    def facts(self) -> dict[str, Fact]:
        if self.best is None:
            return {"last": self.last}
        return {"last": self.last, "best": self.best, "best_step": self.best_step}


def _is_row(item: Mapping[str, Any]) -> bool:
    """True if a line holds a position and otherwise only numbers."""
    kinds = {name: type(value) for name, value in item.items()}
    numbers = {kinds.pop(name, None) for name in ("epoch", "time_s")}
    return kinds.pop("step", None) is int and numbers <= {int, float} and {*kinds.values()} <= {int, float, NoneType}


def _is_event(item: Mapping[str, Any]) -> bool:
    """True if a line holds a time, a step and a kind."""
    return [type(item.get(name)) for name in ("time", "step", "kind")] == [str, int, str]


def _row_line(row: Row) -> bytes:
    position = {"step": row.step, "epoch": round(row.epoch, 6), "time_s": round(row.time_s, 3)}
    return encode(position | {name: row.values[name] for name in sorted(row.values)})


GRADIENTS = "gradients"
"""Prefix of the names of quantiles of gradients."""


PERCENTS = (5, 25, 50, 75, 95, 100)
"""Percentiles that are recorded."""


def quantile_names(prefix: str, part: str) -> list[str]:
    """`gradients/layer_00_q05` and so on, one name for each of `PERCENTS`."""
    return [f"{prefix}/{part}_q{percent:02}" for percent in PERCENTS]


def quantiles_by_part(prefix: str, values: Mapping[str, float]) -> dict[str, Sequence[float]]:
    """The quantiles of each part by its name, sorted; without parts that lack one or have one that is not finite."""
    ending = f"_q{PERCENTS[0]:02}"
    parts = sorted(
        name.removeprefix(f"{prefix}/").removesuffix(ending)
        for name in values
        if name.startswith(f"{prefix}/") and name.endswith(ending)
    )
    found = {part: [values.get(name, math.nan) for name in quantile_names(prefix, part)] for part in parts}
    return {part: quantiles for part, quantiles in found.items() if all(map(math.isfinite, quantiles))}
