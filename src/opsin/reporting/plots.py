"""Pictures of a run: accuracy, loss, schedule, speed and gradients, drawn from `metrics.jsonl` and `events.jsonl`.

`draw_run` draws once. While a run trains, `painter.py` keeps `python -m opsin.reporting.plots DIR` beside it.

However long the run, a curve has at most 2,000 points (`reporting/curves.py`): rows that share one are drawn as
their mean, inside a light band from the lowest to the highest of them.
"""

import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from opsin.errors import RunError
from opsin.reporting.curves import EPOCH, HIGH, LOW, MEAN, MINUTES, History, Table
from opsin.reporting.journal import GRADIENTS, quantile_names, read_events
from opsin.reporting.style import COLOURS, new_figure, to_png
from opsin.storage.directory import RunDirectory
from opsin.storage.files import write_atomic, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SCHEDULE = {"train/lr": "learning rate", "train/momentum": "momentum"}
_SPEED = "train/images_per_s"
_TIMES = {
    "time/data_ms": "waiting for data",
    "time/forward_ms": "forward",
    "time/backward_ms": "backward",
    "time/optimizer_ms": "optimizer",
}

_DRAWN = re.compile("|".join([r".*/(top1|loss)", *_SCHEDULE, _SPEED, *_TIMES, rf"{GRADIENTS}/.*"]))

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_FEW_POINTS = 30
_MAX_NAME_LINES = 4
_MAX_NAME = 40
_MAX_PARTS = 24
_PANEL_INCHES = (4.4, 3.2)
_TEXT, _SMALL = 9.0, 7.5
_GRID, _GREY = "#E8E8E8", "#606060"


def draw_run(directory: Path) -> list[Path]:
    """Draw all pictures in `directory`/plots, except those without numbers; return their paths.

    Raises:
        RunError: matplotlib is missing, or a picture cannot be written.
    """
    return RunPlots(directory).draw()


class RunPlots:
    """Draws a run repeatedly, and reads only the rows that were added."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._history = History(directory / "metrics.jsonl", wanted=_DRAWN)

    def draw(self) -> list[Path]:
        """As `draw_run`."""
        pictures: dict[str, Callable[[_Sheet, History], Figure | None]] = {
            "accuracy.png": _accuracy,
            "loss.png": _loss,
            "schedule.png": _schedule,
            "speed.png": _speed,
            "gradients.png": _gradients,
        }
        self._history.refresh()
        stages = [(name, *self._history.position(step)) for name, step in _stages(self._directory / "events.jsonl")]
        sheet = _Sheet(self._name(), stages)
        folder = self._directory / "plots"
        drawn: list[Path] = []
        with writing(folder, "make room there"):
            for name, picture in pictures.items():
                figure = picture(sheet, self._history)
                if figure is not None:
                    folder.mkdir(exist_ok=True)
                    write_atomic(folder / name, to_png(figure))
                    drawn.append(folder / name)
        return drawn

    def _name(self) -> str:
        name = self._directory.resolve().name
        try:
            return RunDirectory(self._directory).recipe_name() or name
        except RunError:  # whoever opens the run reports a damaged run.json
            return name


class _Sheet:
    """Figures of one look: the run's name, up to two panels, and its stages."""

    def __init__(self, name: str, stages: Sequence[tuple[str, float, float]]) -> None:
        self._name = name
        self._stages = stages

    def panels(self, title: str, count: int, *, same_height: bool = False) -> "tuple[Figure, list[Axes]]":
        """An empty figure with a title, and its panels from left to right."""
        width, height = _PANEL_INCHES
        figure = new_figure(width * count, height)
        figure.suptitle(f"{self._name}: {title}", x=0.01, ha="left", fontsize=_TEXT + 1, parse_math=False)
        panels = list(figure.subplots(1, count, squeeze=False, sharey=same_height)[0])
        for axes in panels:
            axes.grid(color=_GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.margins(x=0.02)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(_GREY)
            axes.tick_params(labelsize=_TEXT - 1, colors=_GREY, labelcolor="black", labelleft=True)
        return figure, panels

    def finish(self, axes: "Axes", column: int, *, label: str = "") -> None:
        """Name the axes and mark where stages begin."""
        axes.set_xlabel("epoch" if column == EPOCH else "training time (minutes)", fontsize=_TEXT)
        axes.set_ylabel(label, fontsize=_TEXT)
        axes.set_xlim(left=0)
        # Names are above the panel, each in the lowest of four lines that is free at its begin; else it is left out.
        right = axes.get_xlim()[1]
        per_letter = 0.55 * _SMALL * right / (72 * 0.85 * _PANEL_INCHES[0])
        ends: list[float] = []
        for name, *position in self._stages if len(self._stages) > 1 else ():
            begin = position[0 if column == EPOCH else 1]
            if begin > 0:
                axes.axvline(begin, color=_GREY, linewidth=0.7, linestyle=(0, (4, 3)))
            at = max(0.0, min(begin, right - per_letter * len(name)))
            line = next((index for index, end in enumerate(ends) if end <= at), len(ends))
            if line == _MAX_NAME_LINES:
                continue
            ends[line : line + 1] = [at + per_letter * (len(name) + 1)]
            axes.text(
                at,
                1.01 + 0.055 * line,
                name,
                transform=axes.get_xaxis_transform(),
                ha="left",
                va="bottom",
                fontsize=_SMALL,
                color=_GREY,
                parse_math=False,
            )


def _accuracy(sheet: _Sheet, history: History) -> "Figure | None":
    tables = _tables(history, "/top1")
    best = {name: f"best {100 * np.nanmax(table[:, HIGH]):.2f} %" for name, table in tables.items()}
    return _scores(sheet, tables, best, "top-1 accuracy (%)", scale=100.0)


def _loss(sheet: _Sheet, history: History) -> "Figure | None":
    tables = _tables(history, "/loss")
    best = {name: f"lowest {np.nanmin(table[:, LOW]):.4g}" for name, table in tables.items()}
    return _scores(sheet, tables, best, "loss", scale=1.0)


def _tables(history: History, ending: str) -> dict[str, Table]:
    """The values with this ending, by the words for a legend."""
    names = {name: name.removesuffix(ending).replace("_ema", " (EMA)") for name in history.names(ending)}
    tables = {words.replace("_", " "): history.table(name) for name, words in names.items()}
    return {words: table for words, table in tables.items() if table is not None}


def _scores(
    sheet: _Sheet, tables: dict[str, Table], best: dict[str, str], quantity: str, *, scale: float
) -> "Figure | None":
    """The values over epochs and over minutes."""
    if not tables:
        return None
    figure, panels = sheet.panels(quantity.partition(" (")[0], 2, same_height=True)
    means = np.concatenate([table[:, MEAN] for table in tables.values()])
    spans_decades = np.nanmin(means) > 0 and np.nanmax(means) > 30 * np.nanmin(means)
    for axes, column in zip(panels, (EPOCH, MINUTES), strict=True):
        for index, (name, table) in enumerate(tables.items()):
            label = name if name == "train" else f"{name}, {best[name]}"
            _line(axes, table, column, index, label, scale=scale)
        if quantity == "loss" and spans_decades:
            axes.set_yscale("log")
        sheet.finish(axes, column, label=quantity if column == EPOCH else "")
    _legend(panels[0])
    return figure


def _schedule(sheet: _Sheet, history: History) -> "Figure | None":
    tables = {name: table for name in _SCHEDULE if (table := history.table(name)) is not None}
    if not tables:
        return None
    figure, panels = sheet.panels(" and ".join(_SCHEDULE[name] for name in tables), len(tables))
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        _line(axes, table, EPOCH)
        values = table[:, MEAN]
        # A cosine ends near zero, too: only values that are small for most of a run need a logarithmic axis.
        if np.nanmin(values) > 0 and np.nanmax(values) > 20 * np.nanmedian(values):
            axes.set_yscale("log")
        elif name == "train/lr":
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
            axes.yaxis.get_offset_text().set_fontsize(_TEXT - 1)
        sheet.finish(axes, EPOCH, label=_SCHEDULE[name])
    return figure


def _speed(sheet: _Sheet, history: History) -> "Figure | None":
    speed = history.table(_SPEED)
    times = {text: table for name, text in _TIMES.items() if (table := history.table(name)) is not None}
    count = (speed is not None) + bool(times)
    if not count:
        return None
    figure, panels = sheet.panels("speed", count)
    if speed is not None:
        _line(panels[0], speed, EPOCH)
        panels[0].set_ylim(bottom=0)
        sheet.finish(panels[0], EPOCH, label="images per second")
    if times:
        _stack(panels[-1], times)
        sheet.finish(panels[-1], EPOCH, label="time per step (ms)")
    return figure


def _gradients(sheet: _Sheet, history: History) -> "Figure | None":
    """The median size of the gradients of each part of the network, and the newest of all quantiles."""
    prefix, ending = f"{GRADIENTS}/", "_q50"
    names = [name for name in history.names(ending) if name.startswith(prefix)]
    # Layers from the image on, then the modules around them.
    names.sort(key=lambda name: (not name.startswith(f"{prefix}layer_"), name))
    medians = {name[len(prefix) : -len(ending)]: table for name in names if (table := history.table(name)) is not None}
    if not medians:
        return None
    figure, (over_time, now) = sheet.panels("sizes of gradients by part", 2)
    for index, (part, table) in enumerate(medians.items()):
        colour = _shade(index / max(len(medians) - 1, 1))
        marker = _MARKERS[0] if len(table) <= _FEW_POINTS else None
        over_time.plot(table[:, EPOCH], _positive(table[:, MEAN]), color=colour, marker=marker, markersize=3, lw=1.2)
        q05, q25, q50, q75, q95, _ = (_newest(history, name) for name in quantile_names(GRADIENTS, part))
        now.plot(_positive(np.array([q05, q95])), [index, index], color=colour, linewidth=1.2)
        now.plot(_positive(np.array([q25, q75])), [index, index], color=colour, linewidth=5, solid_capstyle="butt")
        now.plot(_positive(np.array([q50])), [index], color="white", marker="|", markersize=5)
    over_time.set_yscale("log")
    sheet.finish(over_time, EPOCH, label="median size")
    now.set_xscale("log")
    every = -(-len(medians) // _MAX_PARTS)
    now.set_yticks(range(0, len(medians), every), list(medians)[::every], fontsize=_SMALL, parse_math=False)
    now.invert_yaxis()
    now.set_xlabel("size: 5 to 95 %, 25 to 75 %, median", fontsize=_TEXT)
    return figure


def _shade(depth: float) -> Any:
    """A colour for a part, from the image (0) to the head (1)."""
    import matplotlib as mpl

    return mpl.colormaps["viridis"](0.9 * depth)


def _positive(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The values that a logarithmic axis can show, the rest NaN."""
    return np.where(values > 0, values, np.nan)


def _newest(history: History, name: str) -> float:
    table = history.table(name)
    return math.nan if table is None else float(_finite(table)[1][-1])


def _stack(axes: "Axes", times: dict[str, Table]) -> None:
    epochs = next(iter(times.values()))[:, EPOCH]
    layers = np.array([np.interp(epochs, *_finite(table)) for table in times.values()])  # [parts, P]
    # The first steps may take many times as long (kernels are chosen, compiled): they may leave the panel.
    usual = layers[:, min(layers.shape[1] - 1, 1 + layers.shape[1] // 50) :]
    shares = usual.sum(axis=1) / max(float(usual.sum()), 1e-9)
    labels = [f"{text}, {share:.0%}".replace("%", " %") for text, share in zip(times, shares, strict=True)]
    colours = [_colour(list(_TIMES.values()).index(text) + 1) for text in times]
    axes.stackplot(epochs, layers, labels=labels, colors=colours, linewidth=0)
    axes.set_ylim(0, 1.45 * max(float(usual.sum(axis=0).max()), 1e-3))
    _legend(axes, reverse=True)


def _line(
    axes: "Axes", table: Table, column: int, index: int = 0, label: str | None = None, *, scale: float = 1.0
) -> None:
    x, values = table[:, column], scale * table[:, MEAN:]
    few = len(x) <= _FEW_POINTS
    axes.plot(
        x,
        values[:, 0],
        color=_colour(index),
        linewidth=1.3 if few or index else 1.0,
        marker=_MARKERS[index % len(_MARKERS)] if few else None,
        markersize=3.5,
        label=label,
        zorder=2 + 0.1 * index,
    )
    if (table[:, HIGH] > table[:, LOW]).any():
        axes.fill_between(x, values[:, 1], values[:, 2], color=_colour(index), alpha=0.2, linewidth=0)


def _legend(axes: "Axes", *, reverse: bool = False) -> None:
    corner: Literal["best", "upper right"] = "upper right" if reverse else "best"
    legend = axes.legend(loc=corner, reverse=reverse, fontsize=_TEXT - 1, framealpha=0.8, edgecolor="none")
    for text in legend.get_texts():
        text.set_parse_math(False)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _finite(table: Table) -> tuple[Any, Any]:
    whole = np.isfinite(table[:, MEAN])
    return table[whole, EPOCH], table[whole, MEAN]


def _stages(path: Path) -> list[tuple[str, int]]:
    """Name and first step of every stage. A resume may record its stage again."""
    begun = [(str(event.facts.get("name", "")), event.step) for event in read_events(path) if event.kind == "stage"]
    stages = [(name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…", step) for name, step in begun]
    return [stage for index, stage in enumerate(stages) if index == 0 or stage[0] != stages[index - 1][0]]


def main() -> None:
    """Draw the run of the command line once for every line of standard input.

    Answer each with a line: the seconds it took, a space, and the fault if there was one.
    """
    os.nice(10)
    plots = RunPlots(Path(sys.argv[1]))
    for leftover in Path(sys.argv[1], "plots").glob(".*.writing"):
        leftover.unlink()
    while sys.stdin.readline():
        started = time.monotonic()
        try:
            plots.draw()
            fault = ""
        except Exception as error:  # a fault of a picture is reported, and the next may succeed
            fault = " ".join(str(error).split()) or type(error).__name__
        print(f"{time.monotonic() - started:.3f} {fault}", flush=True)


if __name__ == "__main__":
    main()
