"""Checks of the machine: memory, disk, shared memory, threads, clock, and the data path beside the step."""

import os
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from opsin.data.shared_memory import available_bytes, describe_fitted, fit
from opsin.processes.cores import num_cores
from opsin.reporting.console import duration
from opsin.run.assemble import plan_agenda, temporary_run
from opsin.run.checks.verdict import Verdict
from opsin.run.fit import fit_memory
from opsin.run.forecast import MemoryForecast, stored_bytes
from opsin.run.images import evaluation_context, loading_plan, num_workers
from opsin.run.pace import rate_of, silent_console, small_stage, stream, train_on
from opsin.run.parts import Parts
from opsin.run.recipe import Recipe
from opsin.storage.directory import RunDirectory
from opsin.storage.files import nearest_folder
from opsin.storage.teller import Silence
from opsin.training.checkpoints.checkpoints import most_checkpoints

_MIB = 2**20
_RELEASED = 1_760_000_000
"""Seconds since 1970 before which this code did not exist."""
_SKEW_S = 120.0
_IMAGES = 32
_SECONDS = 1.5


def check_memory(parts: Parts, forecast: MemoryForecast) -> Verdict:
    """Compare the forecast with what is free, and report what a run will do to fit.

    Raises:
        ConfigError: nothing makes it fit.
    """
    text = f"{forecast.peak_bytes / _MIB:,.0f} MiB at the worst moment"
    notes = _Notes()
    if parts.recipe.memory.fit == "auto":
        fit_memory(parts, notes)
    if notes.lines:
        return Verdict("memory", "look", "; ".join(notes.lines).removeprefix("memory: "))
    return Verdict("memory", "fine", text)


def check_scores(recipe: Recipe, parts: Parts) -> Verdict:
    """Build the evaluators, which refuse images without labels and networks that they cannot score.

    Raises:
        ConfigError: one cannot work.
    """
    with tempfile.TemporaryDirectory(prefix="opsin-check-") as folder:
        plan = loading_plan(recipe, parts.images, parts.numerics, Silence())
        context = evaluation_context(recipe, parts.images, parts.numerics, plan, Path(folder))
        for prefix, wanted in recipe.evaluators.items():
            wanted.check(parts.method, prefix)
            wanted.build(context, prefix)
    return Verdict("scores", "fine", ", ".join(recipe.evaluators) or "none")


def check_disk(parts: Parts, forecast: MemoryForecast, out: Path) -> Verdict:
    """Compare the checkpoints to come with the free space at `out`."""
    wanted, agenda = parts.recipe.checkpoints, plan_agenda(parts.recipe, parts.timeline)
    kept = most_checkpoints(wanted, agenda)
    needed, free = (kept + 1) * forecast.state_bytes, shutil.disk_usage(nearest_folder(out)).free
    text = f"{kept} checkpoints and the weights take {needed / _MIB:,.0f} MiB, {free / _MIB:,.0f} MiB are free at {out}"
    if needed > free:
        return Verdict("disk", "fault", f"{text}: make room, choose another --out, or lower checkpoints.keep")
    return Verdict("disk", "fine", text)


def check_directory(out: Path) -> Verdict:
    """Look for an earlier run in `out`, and for the right to write there."""
    above = nearest_folder(out)
    if not os.access(above, os.W_OK):
        return Verdict("directory", "fault", f"{above}: cannot be written; choose another --out")
    if RunDirectory(out).exists():
        text = f"{out}: holds a run already: opsin train goes on with it if the recipe is the same; --fresh starts over"
        return Verdict("directory", "look", text)
    if out.is_dir() and any(out.iterdir()):
        return Verdict("directory", "fault", f"{out}: holds other files than a run; choose another --out")
    return Verdict("directory", "fine", f"{out} is free")


def check_clock(out: Path) -> Verdict:
    """Compare the clock of this machine with the age of this code and with the clock of the disk."""
    now = time.time()
    if now < _RELEASED:
        shown = time.strftime("%Y-%m-%d", time.gmtime(now))
        return Verdict("clock", "fault", f"says {shown}: locks, events and backups depend on it; set it")
    probe = nearest_folder(out) / f".opsin-check-{os.getpid()}"
    try:
        probe.touch()
        skew = probe.stat().st_mtime - now
        probe.unlink()
    except OSError:
        return Verdict("clock", "fine", "plausible")
    if abs(skew) > _SKEW_S:
        disk = f"differs by {duration(abs(skew))} from that of the disk at {nearest_folder(out)}"
        text = f"{disk}: a lock may be taken for an old one; set both"
        return Verdict("clock", "look", text)
    return Verdict("clock", "fine", "plausible, and that of the disk agrees")


def check_loading(recipe: Recipe, parts: Parts) -> Verdict:
    """Compare the data path with the update, each alone, on small batches."""
    small = small_stage(recipe, min(_IMAGES, len(parts.images.train)))
    with temporary_run(small, silent_console(), parts.images) as run:
        state = run.start.fresh()
        with closing(stream(run)) as batches:
            batch = next(batches)
            rate_of((len(next(batches)) for _ in range(4)), 0.0)  # workers have started
            data = rate_of(map(len, batches), _SECONDS)
        train_on(state, run, [batch])
        updates = rate_of((train_on(state, run, [batch]) for _ in iter(int, 1)), _SECONDS)
    text = f"{data:,.0f} images/s from the disk to the batch, {updates:,.0f} images/s of updates"
    if data < updates:
        text += ": training waits for its data"
        return Verdict("loading", "look", f"{text}; opsin tune loader measures settings, smaller files load faster")
    return Verdict("loading", "fine", text)


def check_shared_memory(parts: Parts) -> Verdict:
    """Compare /dev/shm with the batches of the workers."""
    asked = num_workers(parts.recipe), parts.recipe.data.prefetch
    batch_bytes = stored_bytes(parts)
    available = available_bytes()
    if available is None or batch_bytes == 0:
        return Verdict("shared memory", "fine", "not needed")
    fitted = fit(*asked, batch_bytes, available)
    if fitted.reason is not None:
        return Verdict("shared memory", "look", describe_fitted(fitted, asked=asked, batch_bytes=batch_bytes))
    return Verdict("shared memory", "fine", f"{available / _MIB:,.0f} MiB for batches of {batch_bytes / _MIB:,.1f} MiB")


def check_threads() -> Verdict:
    """Compare the threads of torch with the cores that this process may use."""
    usable, threads = num_cores(), torch.get_num_threads()
    text = f"{threads} for {usable} usable cores of {os.cpu_count()}"
    if threads > usable:
        return Verdict("threads", "look", f"{text}: they take turns; unset OMP_NUM_THREADS, or set it to {usable}")
    return Verdict("threads", "fine", text)


class _Notes(Silence):
    """A teller that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def notice(self, text: str) -> None:
        self.lines.append(text)
