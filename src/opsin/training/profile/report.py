"""The results of a profile: `split.json` and `split.png`, a table for the terminal, and torch's own trace."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.autograd import DeviceType  # type: ignore[attr-defined]  # not in torch's stubs
from torch.profiler import profile as Recording

from opsin.reporting.style import BLUE, new_figure, to_png
from opsin.storage.files import write_atomic
from opsin.training.profile.parts import OTHER, Spread

_OPERATORS = 20
_GREY, _PALE = "#606060", "#9A9A9A"
_TEXT = 9.0
_ROW_INCHES = 0.3


@dataclass(frozen=True, slots=True)
class Operator:
    """An operation of torch without the operations that it calls; on a GPU the time of its kernels."""

    name: str
    self_ms: float
    """Milliseconds in a step."""
    calls: float
    """Calls in a step."""


@dataclass(frozen=True, slots=True)
class TimeBreakdown:
    """The time of the profiled steps by part: the content of `split.json`."""

    device: str
    first_step: int
    last_step: int
    steps: int
    images_per_s: float
    step: Spread
    device_idle: Spread | None
    """Idle time of a GPU in a step; it is part of `data` and `other`."""
    parts: Mapping[str, Spread]
    operators: Sequence[Operator]
    """The slowest operators of the steps in the trace."""

    def share(self, part: str) -> float:
        """The share of a part in the time of the steps."""
        return self.parts[part].mean_ms / self.step.mean_ms

    def head(self) -> str:
        """A summary in one line."""
        return (
            f"steps {self.first_step} to {self.last_step} on {self.device}: "
            f"{self.step.mean_ms:.2f} ms each, {self.images_per_s:,.0f} images/s"
        )

    def lines(self) -> list[str]:
        """A table for the terminal."""
        rows = [
            f"  {name:<16}{spread.mean_ms:>10.2f} ms{_percent(self.share(name)):>9}   p90 {spread.p90_ms:.2f} ms"
            for name, spread in self.parts.items()
        ]
        return [f"profile: {self.head()}", *rows]

    def write(self, folder: Path) -> None:
        """Put `split.json` and `split.png` into `folder`.

        Raises:
            OSError: it cannot be written.
            RunError: matplotlib is missing; the numbers are there.
        """
        parts = {name: {**asdict(spread), "share": self.share(name)} for name, spread in self.parts.items()}
        folder.mkdir(exist_ok=True)
        write_atomic(folder / "split.json", (json.dumps({**asdict(self), "parts": parts}, indent=2) + "\n").encode())
        write_atomic(folder / "split.png", draw_breakdown(self))


def draw_breakdown(times: TimeBreakdown) -> bytes:
    """A bar for the mean of each part, and a line from its shortest to its 90th percentile, as PNG.

    Raises:
        RunError: matplotlib cannot be imported.
    """
    names = list(times.parts)
    figure = new_figure(6.4, 1.1 + _ROW_INCHES * len(names))
    figure.suptitle(times.head(), x=0.01, ha="left", fontsize=_TEXT + 1, parse_math=False)
    axes = figure.add_subplot()
    means = [spread.mean_ms for spread in times.parts.values()]
    axes.barh(names, means, height=0.62, color=[_PALE if name == OTHER else BLUE for name in names])
    for row, (name, spread) in enumerate(times.parts.items()):
        axes.plot([spread.min_ms, spread.p90_ms], [row, row], color="black", linewidth=1.0)
        text = f" {spread.mean_ms:.2f} ms, {_percent(times.share(name))}"
        axes.text(max(spread.mean_ms, spread.p90_ms), row, text, va="center", fontsize=_TEXT - 1)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(max(spread.mean_ms, spread.p90_ms) for spread in times.parts.values()))
    axes.set_xlabel("mean time in a step (ms); line: minimum to 90th percentile", fontsize=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(labelsize=_TEXT - 1, colors=_GREY, labelcolor="black")
    axes.tick_params(axis="y", length=0)
    return to_png(figure)


def write_trace(recording: Recording, path: Path) -> None:
    """Chrome's trace format, for chrome://tracing or ui.perfetto.dev.

    Raises:
        OSError: it cannot be written; the old content stays.
    """
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(f".{path.name}.writing")
    try:
        recording.export_chrome_trace(str(unfinished))
        # The profiler does not report a full disk.
        if not unfinished.exists() or not _last_bytes(unfinished).endswith(b"}"):
            raise OSError("the trace is cut off; is the disk full?")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def top_operators(recording: Recording, steps: int, *, on_device: bool) -> list[Operator]:
    """The operators with the most time of their own, in `steps` recorded steps."""
    found = []
    for one in recording.key_averages():
        if one.device_type != DeviceType.CPU or one.is_user_annotation:
            continue
        own_us = one.self_device_time_total if on_device else one.self_cpu_time_total
        found.append(Operator(one.key, own_us / 1000 / steps, one.count / steps))
    return sorted(found, key=lambda operator: -operator.self_ms)[:_OPERATORS]


def _last_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        return file.read().rstrip()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
