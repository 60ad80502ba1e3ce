"""The console of a run: a progress bar on a terminal, plain lines elsewhere.

Values are named as in the journal (`train/loss`, `val/top1`); accuracies are fractions in 0..1.
"""

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TextIO

from opsin.storage.teller import Teller

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_SHOWN = ("train/loss", "train/top1", "train/images_per_s", "train/lr", "gpu/peak_memory_gib")
_BAR_EVERY_S = 0.25
_WARM_UP, _FORESEEN_AFTER_S = 3, 5.0
"""Steps that do not count in the forecast of the time, and the seconds that it is measured for."""
_WORTH_SAYING_S = 60.0


class Log(Protocol):
    """A file that gets the lines of a console, too."""

    def say(self, text: str) -> None:
        """Add a line; never raises."""
        ...


def open_console(*, quiet: bool = False, stream: TextIO | None = None, log: Log | None = None) -> "Console":
    """The console that fits `stream` (standard output if None).

    `quiet` leaves only warnings. `log` gets every line but progress, quiet or not.
    """
    stream = sys.stdout if stream is None else stream
    live = stream.isatty() and os.environ.get("TERM") != "dumb" and not quiet
    return LiveConsole(stream, log=log) if live else Console(stream, quiet=quiet, log=log)


class Console(Teller):
    """Plain lines without control characters; progress every `every_s` seconds. Events are not recorded."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, log: Log | None = None, every_s: float = 10.0) -> None:
        self._stream = stream
        self._quiet = quiet
        self._log = log
        self._every_s = every_s
        self._gone = False
        self.start(total_steps=0, first_step=0, total_epochs=0.0)

    def notice(self, text: str) -> None:
        """Print a fact worth knowing: `precision: bf16 (this CPU has AVX-512 bf16)`."""
        self._line(text, quiet=self._quiet)

    def warning(self, text: str) -> None:
        """Print that something is wrong while training goes on; shown even when quiet."""
        self._line(f"warning: {text}", quiet=False)

    def start(self, *, total_steps: int, first_step: int, total_epochs: float) -> None:
        """Begin the display at `first_step`; the time left is counted from here."""
        self._total_steps = total_steps
        self._first_step = first_step
        self._total_epochs = total_epochs
        self._started = self._shown_at = time.monotonic()
        self._values: dict[str, float] = {}
        self._foreseen_from: tuple[int, float] | None = None
        self._is_foreseen = False

    def progress(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Show that `step` updates are done; cheap enough for every step. Values that are missing stay as they were."""
        self._values.update(values)
        now = time.monotonic()
        if not self._is_foreseen:
            self._foresee(step, now)
        if now - self._shown_at >= self._every_s:
            self._shown_at = now
            self._show_progress(step, epoch)

    def _foresee(self, step: int, now: float) -> None:
        """Once, after a few steps, print how long the rest takes; the first ones are slower and do not count."""
        if self._foreseen_from is None:
            if step >= self._first_step + _WARM_UP:
                self._foreseen_from = step, now
            return
        begun, started = self._foreseen_from
        if step - begun < _WARM_UP or now - started < _FORESEEN_AFTER_S:
            return
        self._is_foreseen = True
        left = self._total_steps - step
        seconds = (now - started) * left / (step - begun)
        if seconds >= _WORTH_SAYING_S:
            self.notice(f"about {duration(seconds)} for {left:,} more steps at this pace")

    def epoch(
        self, epoch: float, values: Mapping[str, float], *, seconds: float, best: Mapping[str, float] | None = None
    ) -> None:
        """Print one line on an epoch: its values, the best so far, and its time."""
        words = [f"epoch {epoch:g}/{self._total_epochs:g}", describe(values)]
        words += [f"best {describe({name: value})}" for name, value in (best or {}).items()]
        self._line("  ".join([*words, duration(seconds)]), quiet=self._quiet)

    def finish(self, text: str = "") -> None:
        """End the display, since training is over or interrupted, and print `text`. May be called twice."""
        if text:
            self._line(text, quiet=self._quiet)

    def _show_progress(self, step: int, epoch: float) -> None:
        if not self._quiet:
            shown = {name: self._values[name] for name in _SHOWN if name in self._values}
            position = f"epoch {epoch:.2f}/{self._total_epochs:g}  step {step}/{self._total_steps}"
            self._print("  ".join([position, describe(shown), f"{self._time_left(step)} left"]))

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "?"
        return duration((time.monotonic() - self._started) * (self._total_steps - step) / done)

    def _line(self, text: str, *, quiet: bool) -> None:
        if self._log is not None:
            self._log.say(text)
        if not quiet:
            self._print(text)

    def _print(self, text: str) -> None:
        if self._gone:
            return
        try:
            self._write(text)
        except (OSError, ValueError):  # a closed pipe, window or file: the reader left, training goes on
            self._gone = True

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


class LiveConsole(Console):
    """A progress bar that stays below the lines. Drawn four times a second at most, by no thread."""

    def __init__(self, stream: TextIO, *, log: Log | None = None) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        super().__init__(stream, log=log, every_s=_BAR_EVERY_S)

    def start(self, *, total_steps: int, first_step: int, total_epochs: float) -> None:
        super().start(total_steps=total_steps, first_step=first_step, total_epochs=total_epochs)
        if total_steps == 0:
            return
        from rich.console import Console as Screen
        from rich.progress import BarColumn, Progress, TextColumn

        self.finish()
        self._bar = Progress(
            TextColumn("{task.fields[position]}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[values]}", markup=False),
            console=Screen(file=self._stream),
            auto_refresh=False,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, position="", values="")

    def finish(self, text: str = "") -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()
        super().finish(text)

    def _show_progress(self, step: int, epoch: float) -> None:
        if self._bar is None or self._task is None:
            return
        shown = {name: self._values[name] for name in _SHOWN if name in self._values}
        position = f"epoch {epoch:.1f}/{self._total_epochs:g}  step {step}/{self._total_steps}"
        values = f"{describe(shown)}  {self._time_left(step)} left"
        self._bar.update(self._task, completed=step, position=position, values=values, refresh=True)

    def _write(self, text: str) -> None:
        if self._bar is None:
            super()._write(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(values: Mapping[str, float]) -> str:
    """Values in words: `loss 0.4123  val top1 97.80 %  4,512 images/s  lr 0.0003`."""
    return "  ".join(_phrase(name, value) for name, value in values.items())


def duration(seconds: float) -> str:
    """Time in its two largest units: `8.2 s`, `1 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole // 60} min {whole % 60} s"


def _phrase(name: str, value: float) -> str:
    prefix, _, kind = name.rpartition("/")
    label = kind if prefix in ("", "train") else f"{prefix} {kind}"
    if kind in ("top1", "top5", "accuracy"):
        return f"{label} {100 * value:.2f} %"
    if kind == "images_per_s":
        return f"{value:,.0f} images/s"
    return f"{label} {value:.4g}"
