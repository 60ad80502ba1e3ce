"""Copies of the journal in other forms: a table, TensorBoard, plain text.

None is needed to resume or to judge a run, and each may be missing or fail.
"""

import csv
import io
import json
import math
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from opsin.errors import LockLost
from opsin.reporting.journal import GRADIENTS, PERCENTS, Event, Row, Sink, quantile_names, quantiles_by_part, read_rows
from opsin.storage.files import write_atomic
from opsin.storage.teller import Owner, Teller

if TYPE_CHECKING:
    from tensorboard.compat.proto.histogram_pb2 import HistogramProto  # type: ignore[import-untyped]

_SMALLEST = 1e-30
"""Zero has no logarithm."""


class CsvTable(Sink):
    """`log.csv`: `metrics.jsonl` as a table, one column per name, empty where a row has no value.

    Written again from `metrics.jsonl` at the first row of an epoch, after a resume and at the end; so it
    needs no state, and its header always fits.
    """

    name = "log.csv"
    _epoch = 0
    _next_s = 0.0

    def write(self, row: Row) -> None:
        """Make the table when a new epoch has begun."""
        if int(row.epoch) > self._epoch and time.monotonic() >= self._next_s:
            self._make()
            self._epoch = int(row.epoch)

    def rewind(self, step: int) -> None:
        self._make()

    def close(self) -> None:
        self._make()

    def _make(self) -> None:
        started = time.monotonic()
        rows = list(read_rows(self.folder / "metrics.jsonl"))
        names = sorted({name for row in rows for name in row.values})
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["step", "epoch", "time_s", *names])
        for row in rows:
            table.writerow([row.step, row.epoch, row.time_s, *(row.values.get(name, "") for name in names)])
        write_atomic(self.folder / self.name, text.getvalue().encode())
        # Long logs with short epochs: at most a twentieth of the time goes into tables.
        now = time.monotonic()
        self._next_s = now + 20 * (now - started)


class TensorBoard(Sink):
    """`tensorboard/`: every value by step, the quantiles of a part as one histogram.

    Records are written in this thread: the thread of TensorBoard's own writer dies on a full disk.
    The package is imported at the first row (about 0.2 s), not before the first step.
    """

    name = "tensorboard"
    package = "tensorboard"

    def __init__(self, folder: Path, teller: Teller) -> None:
        super().__init__(folder, teller)
        self._begin(purge_from=None)

    def write(self, row: Row) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record  # type: ignore[import-untyped]
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        now = time.time()
        records = []
        if self._end == 0:
            records.append(Record(wall_time=now, file_version="brain.Event:2"))
            if self._purge_from is not None:
                start = SessionLog(status=SessionLog.START)
                records.append(Record(wall_time=now, step=self._purge_from, session_log=start))
        parts = quantiles_by_part(GRADIENTS, row.values)
        in_parts = {name for part in parts for name in quantile_names(GRADIENTS, part)}
        scalars = {"epoch": row.epoch, **row.values}
        values = [Summary.Value(tag=name, simple_value=scalars[name]) for name in sorted(scalars.keys() - in_parts)]
        values += [
            Summary.Value(tag=f"{GRADIENTS}/{part} (log10)", histo=_histogram(quantiles))
            for part, quantiles in parts.items()
        ]
        records.append(Record(wall_time=now, step=row.step, summary=Summary(value=values)))
        self._append([record.SerializeToString() for record in records])

    def rewind(self, step: int) -> None:
        """Forget later steps, and add earlier ones that no session has written."""
        last = last_recorded_step(self.folder / self.name)
        whole = -1 if last is None else min(last, step) - 1  # of the last step itself only a part may be there
        self._begin(purge_from=None if last is None else whole + 1)
        for row in read_rows(self.folder / "metrics.jsonl"):
            if whole < row.step <= step:
                self.write(row)

    def _begin(self, *, purge_from: int | None) -> None:
        # Readers take the files in the order of their names, and drop steps from `purge_from` on when a
        # later file begins with it.
        self._path = self.folder / self.name / f"events.out.tfevents.{time.time():.6f}"
        self._end = 0
        self._purge_from = purge_from

    def _append(self, records: Sequence[bytes]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        data = io.BytesIO()
        for record in records:
            RecordWriter(data).write(record)
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("r+b" if self._path.exists() else "xb", buffering=0) as file:
            file.seek(self._end)  # over the rest of a failed attempt
            if file.write(data.getvalue()) < data.tell():
                raise OSError("no space left on the device")
        self._end += data.tell()


def _histogram(quantiles: Sequence[float]) -> "HistogramProto":
    """Shares of values by the logarithm of their size; the smallest lie within a decade."""
    from tensorboard.compat.proto.histogram_pb2 import HistogramProto

    shares: dict[float, float] = {}
    for quantile, percent, below in zip(quantiles, PERCENTS, (0, *PERCENTS), strict=False):
        edge = math.log10(max(quantile, _SMALLEST))
        shares[edge] = shares.get(edge, 0.0) + (percent - below) / 100
    edges = list(shares)
    return HistogramProto(min=edges[0] - 1, max=edges[-1], num=1.0, bucket_limit=edges, bucket=list(shares.values()))


def last_recorded_step(folder: Path) -> int | None:
    """The last step in the newest TensorBoard file of `folder` that has one; None if there is none."""
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        if (record := _last_record(path.read_bytes())) is None:
            continue
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from tensorboard.compat.proto.event_pb2 import Event as Record

        with suppress(DecodeError):
            event = Record.FromString(record)
            if event.HasField("summary"):
                return int(event.step)
    return None


def _last_record(data: bytes) -> bytes | None:
    """The last whole record: its length in 8 bytes, a checksum in 4, the content, and a checksum in 4."""
    start, last = 0, None
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        if start + 16 + length > len(data):  # torn
            break
        last = data[start + 12 : start + 12 + length]
        start += 16 + length
    return last


class TextLog(Sink):
    """`log.txt`: one line per row, event and console message, for `tail -f`. Never rewritten."""

    name = "log.txt"

    def __init__(self, folder: Path, teller: Teller, *, owner: Owner | None = None) -> None:
        """`say` writes nothing once `owner` has lost its lock."""
        super().__init__(folder, teller)
        self._path = folder / self.name
        self._owner = owner
        self._unsaid: deque[str] = deque(maxlen=1000)
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Add a line of any text, in any thread. A line that fails waits for the next; the oldest of many are lost."""
        with self._lock, suppress(OSError, LockLost):
            if self._owner is not None:
                self._owner.check_held()
            self._unsaid.append(_dated(text))
            while self._unsaid:
                self._add(self._unsaid[0])
                self._unsaid.popleft()

    def line(self, text: str) -> None:
        """Add a line of any text.

        Raises:
            OSError: it cannot be written.
        """
        self._add(_dated(text))

    def _add(self, line: str) -> None:
        data = line.encode("utf-8", "replace")
        with self._path.open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(data) < len(data):
                file.truncate(before)
                raise OSError("no space left on the device")

    def write(self, row: Row) -> None:
        values = "  ".join(f"{name} {value:.6g}" for name, value in sorted(row.values.items()))
        self.line(f"step {row.step}  epoch {row.epoch:.3f}  {values}")

    def event(self, event: Event) -> None:
        facts = "  ".join(f"{name}={json.dumps(value, default=str)}" for name, value in event.facts.items())
        self.line(f"step {event.step}  {event.kind}  {facts}".rstrip())

    def rewind(self, step: int) -> None:
        if self._path.exists() and b"  step " in self._path.read_bytes():
            self.line(f"continues after step {step}; later steps above are done again")

    def catch_up(self, step: int) -> None:
        self.line(f"lines up to step {step} could not be written; the values are in metrics.jsonl")


def _dated(text: str) -> str:
    return f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n"
