"""Variants of a recipe, measured in turns: each in a process of its own, one after another, round by round.

Other work on a machine changes rates by more than most settings do, but it changes two neighbours of a round alike. So
ratios are taken within a round, and the spread of repeated measurements stands beside every rate.
"""

import contextlib
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from opsin.processes.trail import SUPERVISOR
from opsin.run.recipe import Recipe
from opsin.settings.text import to_yaml
from opsin.storage.teller import Teller
from opsin.tuning.probe import Answer, Fault, Measured, Ready, from_line

_ROUNDS, FEWEST_ROUNDS = 5, 3
_SHORTEST_S, _LONGEST_S = 0.5, 3.0
"""Seconds of one measurement."""
_MEASURING = 0.7
"""Share of the time of a comparison that is planned for measurements; processes start in the rest."""
_SPARE = 1.3
"""A further process is started where this many times the memory of the largest one is free."""
_GRACE_S, _PAUSE_S = 5.0, 0.02
_READY_S, _PATIENCE_S = 150.0, 600.0
"""Seconds for the first updates, which may be compiled, and for a measurement; later a process is said to hang."""
_LEAST_SPREAD = 0.02
"""Rates that differ by less are taken as equal, however steady they are."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A recipe that differs from another one in the keys of `found`."""

    found: Mapping[str, object]
    recipe: Recipe
    name: str
    """The variant in a table."""


@dataclass(slots=True)
class Timing:
    """Measurements of a variant so far, in images per second."""

    variant: Variant
    rates: list[float] = field(default_factory=list)
    start_s: float = 0.0
    """Seconds until the first updates are done: weights, workers, compilation."""
    peak_bytes: int = 0
    fault: str = ""
    """The reason for which there are no more; empty if there are."""

    @property
    def rate(self) -> float:
        """The median rate; 0 without a measurement."""
        return statistics.median(self.rates) if self.rates else 0.0

    @property
    def spread(self) -> float:
        """Distance of the slowest rate from the fastest one, as a share of the median.

        Of four and more the slowest does not count: work of others makes single measurements slow, and none fast.
        """
        if len(self.rates) < 2:
            return 0.0
        kept = sorted(self.rates)[1 if len(self.rates) > 3 else 0 :]
        return (kept[-1] - kept[0]) / self.rate

    def gain_over(self, other: "Timing") -> float:
        """Median of the ratios of the common rounds, less 1."""
        ratios = [mine / its for mine, its in zip(self.rates, other.rates, strict=False)]
        return statistics.median(ratios) - 1 if ratios else 0.0

    def noise_beside(self, other: "Timing") -> float:
        """The gain that repeated measurements of these two give without a cause."""
        return max(self.spread, other.spread, _LEAST_SPREAD)

    def as_dict(self) -> dict[str, object]:
        """The measurements for programs."""
        facts = {"name": self.variant.name, "keys": dict(self.variant.found), "rates": self.rates, "rate": self.rate}
        return {**facts, "spread": self.spread, "start_s": self.start_s, "peak_bytes": self.peak_bytes} | (
            {"fault": self.fault} if self.fault else {}
        )


class Bench:
    """Processes that train variants, as many at a time as memory holds. They end with the block."""

    def __init__(self, stage: int, fraction: float, teller: Teller) -> None:
        """`stage` is the number of the stage that is trained; `fraction` that of the free memory for each process."""
        self._stage = stage
        self._fraction = fraction
        self._teller = teller
        self._probes: dict[str, _Probe] = {}
        self._largest = 0
        self._free: int | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="opsin-tune-", ignore_cleanup_errors=True)

    def compare(self, timings: Sequence[Timing], seconds: float, *, rounds: int = _ROUNDS) -> None:
        """Measure the variants in turns, for about `seconds` once the first is ready; add to their timings.

        Each is measured in three rounds at least, if `rounds` are not fewer. One that cannot be built or has too little
        memory gets its fault.
        """
        self._teller.notice(f"measuring {timings[0].variant.name}")
        self._try(timings[0], time.monotonic(), None)
        ends = time.monotonic() + seconds
        for timing in timings[1:]:
            if time.monotonic() > ends:
                timing.fault = "not measured: the time was over"
            else:
                self._teller.notice(f"measuring {timing.variant.name}")
                self._try(timing, ends, None)
        for number in range(rounds):
            alive = [timing for timing in timings if not timing.fault]
            if not alive or (number >= FEWEST_ROUNDS and time.monotonic() > ends):
                return
            share = _MEASURING * seconds / (rounds * len(alive))
            for timing in alive if number % 2 == 0 else alive[::-1]:
                self._try(timing, ends, min(max(share, _SHORTEST_S), _LONGEST_S))

    def _try(self, timing: Timing, ends: float, seconds: float | None) -> None:
        """Have a process ready for a variant, and measure it; a lack of memory beside others is no fault."""
        answer = self._ask(timing, ends, seconds)
        if isinstance(answer, Fault) and answer.is_memory and self._probes:
            self._close_others("")
            answer = self._ask(timing, ends, seconds)
        if isinstance(answer, Fault):
            timing.fault = answer.reason
        if isinstance(answer, Measured):
            timing.rates.append(answer.images / answer.seconds)
            timing.peak_bytes = max(timing.peak_bytes, answer.peak_bytes)
            self._largest, self._free = max(self._largest, answer.peak_bytes), answer.free_bytes

    def _ask(self, timing: Timing, ends: float, seconds: float | None) -> Answer:
        key = to_yaml(timing.variant.recipe, comments=False)
        probe = self._probes.pop(key, None)
        if probe is None:
            self._make_room()
            patience = max(_READY_S, ends - time.monotonic())
            probe = _Probe(Path(self._folder.name), key, self._stage, self._fraction)
            self._probes[key] = probe
            answer: Answer = probe.answer(patience)
            if isinstance(answer, Ready):
                probe.ready = answer
        else:
            self._probes[key] = probe  # the newest is last
            answer = probe.ready
        if isinstance(answer, Ready):
            timing.start_s = answer.start_s
            if seconds is not None:
                answer = probe.measure(seconds)
        if isinstance(answer, Fault):
            self._probes.pop(key).close()
        return answer

    def _make_room(self) -> None:
        """End processes that have not been asked for longest, where memory is short for one more."""
        while self._probes and self._free is not None and self._free < _SPARE * self._largest:
            oldest = next(iter(self._probes.values()))
            self._free += oldest.peak_bytes
            self._close_others("", most=1)

    def _close_others(self, kept: str, *, most: int | None = None) -> None:
        for key in [key for key in self._probes if key != kept][:most]:
            self._probes.pop(key).close()

    def keep_only(self, variant: Variant) -> None:
        """End the processes of all other variants."""
        self._close_others(to_yaml(variant.recipe, comments=False))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_others("")
        self._folder.cleanup()


class _Probe:
    """A process of `opsin.tuning.probe`."""

    def __init__(self, folder: Path, recipe: str, stage: int, fraction: float) -> None:
        file = Path(tempfile.mkdtemp(dir=folder), "recipe.yaml")
        file.write_text(recipe)
        self._messages = file.with_name("messages")
        self.peak_bytes = 0
        self.ready = Ready(0.0)
        environment = {
            **os.environ,
            "TMPDIR": str(folder),
            SUPERVISOR: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, "-m", "opsin.tuning.probe", str(file), str(stage), str(fraction)]
        with self._messages.open("wb") as messages:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env=environment,
                process_group=0,  # Ctrl-C in a terminal ends this process alone, which then ends its children
            )
        self._unread = b""

    def measure(self, seconds: float) -> Answer:
        """Train for `seconds`."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(f"{seconds}\n".encode())
            self._child.stdin.flush()
        except BrokenPipeError:
            return self._end()
        answer = self.answer(_PATIENCE_S)
        if isinstance(answer, Measured):
            self.peak_bytes = answer.peak_bytes
        return answer

    def answer(self, patience_s: float) -> Answer:
        """The next answer, within a time."""
        assert self._child.stdout is not None
        ends = time.monotonic() + patience_s
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._child.stdout], [], [], max(0.0, ends - time.monotonic()))
            if not readable:
                return Fault(f"no answer within {patience_s:.0f} s")
            data = os.read(self._child.stdout.fileno(), 1 << 16)
            if not data:
                return self._end()
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return from_line(line.decode())

    def close(self) -> None:
        """End the process, and those that it started."""
        self._child.terminate()
        self._child.wait()
        # What it started notices, and cleans up after itself.
        ends = time.monotonic() + _GRACE_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < ends:
                os.killpg(self._child.pid, 0)
                time.sleep(_PAUSE_S)
            os.killpg(self._child.pid, signal.SIGKILL)
        for stream in (self._child.stdin, self._child.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _end(self) -> Fault:
        """The fault of a process that ended without a word."""
        status = self._child.wait()
        if status < 0:
            is_killed = -status == signal.SIGKILL
            words = ", as the system does when memory ends" if is_killed else ""
            return Fault(f"ended by {signal.Signals(-status).name}{words}", is_killed)
        said = self._messages.read_text(errors="replace").strip().splitlines()
        return Fault(f"ended with status {status}: {said[-1] if said else 'it said nothing'}")
