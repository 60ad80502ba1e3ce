"""One go at a run: from a recipe to the files of a run directory.

A run may take several sessions. Each opens the directory, trains, and leaves it whole whatever happens.
"""

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from opsin.errors import ConfigError, RunError, Stopped
from opsin.export.encoder import write_model
from opsin.processes.cores import num_cores
from opsin.reporting.console import Console, describe, duration, open_console
from opsin.reporting.journal import Journal, Sink
from opsin.reporting.painter import Plots
from opsin.reporting.sinks import CsvTable, TensorBoard, TextLog
from opsin.reporting.teller import RunTeller
from opsin.reporting.webhook import Webhook, webhook_url
from opsin.run.assemble import assemble
from opsin.run.choice import choose
from opsin.run.fit import fitted, keep_choices
from opsin.run.numerics import explain_torch_errors
from opsin.run.parts import build_parts
from opsin.run.rates import settle_rates
from opsin.run.recipe import Recipe, read
from opsin.run.threads import choose_threads, computing, describe_change
from opsin.settings.extensions import subclasses
from opsin.settings.text import diff, to_yaml
from opsin.storage.backup.config import BackupConfig
from opsin.storage.backup.elsewhere import begin_elsewhere, find_elsewhere
from opsin.storage.backup.service import open_backup, refuse_taken
from opsin.storage.directory import RunDirectory, spelled_out
from opsin.storage.files import writing
from opsin.storage.teller import Silence, Teller
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.evaluations import AVERAGED
from opsin.training.loop import Run, fit
from opsin.training.precision import choose_device, describe_device, peak_memory_bytes
from opsin.training.state import TrainState

FIXED = ("seed", "data.image_size", "method.name", "model.", "optim.name")
"""Keys that a run keeps for life: its state would not fit, or its random numbers would not go on."""
_SHOWN = 8  # differences from a publication that are listed one by one
_LEARNED = ("stages", "epochs", "batch_size", "data.image_size", "data.drop_last", "model.", "method.", "optim.")


def train(
    recipe: str | Path | Recipe, *, out: str | Path | None = None, fresh: bool = False, **overrides: object
) -> Run:
    """Train a recipe: a shipped name, a YAML path, or a `Recipe`. Goes on where `out` holds a checkpoint.

    `out` may be an address (`s3://BUCKET/FOLDER`): the run is in `~/.cache/opsin/runs` and copied there.

    Overrides are keyword arguments: `train("quickstart", epochs=3, **{"optim.lr": 0.001})`.

    Raises:
        OpsinError: see `opsin.errors`; the command line turns each kind into an exit status.
    """
    folder = Path("runs", "recipe" if isinstance(recipe, Recipe) else Path(recipe).stem)
    elsewhere = None
    if out is not None:
        folder = Path(os.path.expanduser(out))
        elsewhere = find_elsewhere(str(out), None)
    if elsewhere is not None:
        begin_elsewhere(elsewhere, open_console(quiet=False))
        folder = elsewhere.folder
    if isinstance(recipe, Recipe):
        if overrides:
            raise ConfigError("train: overrides go with a recipe's name or path; change a Recipe with model_copy")
        name, wanted = "recipe", recipe
    else:
        texts = [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in overrides.items()]
        name, wanted = Path(recipe).stem, choose(str(recipe), texts, None if fresh else folder, open_console())
    if elsewhere is not None:
        backup = wanted.backup or BackupConfig(path=elsewhere.url)
        wanted = wanted.model_copy(update={"backup": backup.model_copy(update={"path": elsewhere.url})})
    return train_recipe(wanted, folder, name=name, fresh=fresh)


def train_recipe(recipe: Recipe, out: Path, *, name: str, fresh: bool = False, quiet: bool = False) -> Run:
    """Train `recipe` in the directory `out`, going on from its newest checkpoint if it has one.

    Raises:
        RunError: `out` holds another run, or cannot be written; with `fresh`, its backup holds a run.
        OpsinError: whatever ends the training early.
    """
    out = spelled_out(out)
    if fresh:
        refuse_taken(recipe.backup)
    notes: list[str] = []
    settled = settle_rates(recipe, out, name=name, teller=open_console(quiet=quiet))
    if settled != recipe:
        notes.append(f"optim.lr: {settled.optim.lr}, found by a sweep")
    recipe = settled if fresh else keep_choices(settled, out)
    with RunDirectory.prepare(out, fresh=fresh) as directory:
        # Without weights nothing is lost by starting over with the corrected recipe.
        has_weights = find_checkpoints(directory.checkpoints) or directory.model.exists()
        differences = diff(read(str(directory.recipe)), recipe) if has_weights and directory.recipe.exists() else ()
        directory.take_recipe(to_yaml(recipe, comments=False), differences=differences)
        return _train_in(directory, recipe, name, notes, quiet=quiet)


def resume_run(path: Path, overrides: Sequence[str], *, quiet: bool = False) -> Run:
    """Go on with the run in `path`, with changed keys if wanted.

    Raises:
        RunError: there is no run, or a key was changed that a run keeps for life.
        OpsinError: whatever ends the training early.
    """
    path = spelled_out(path)
    directory = RunDirectory(path)
    if not directory.recipe.exists():
        raise RunError(
            f"{path}: holds no run to resume (no recipe.yaml); start one with opsin train RECIPE --out {path}"
        )
    before, after = read(str(directory.recipe)), read(str(directory.recipe), overrides)
    name = directory.recipe_name() or path.name
    after = settle_rates(after, path, name=name, teller=open_console(quiet=quiet))
    changed = diff(before, after)
    refused = [line for line in changed if line.startswith(FIXED)]
    if refused:
        raise RunError(*(f"{path}: {line}: a run keeps this key; start a new run with --out" for line in refused))
    notes = [f"changed: {line}" for line in changed]
    # The changes are written down when it is sure that the run can go on with them.
    with RunDirectory.prepare(path, fresh=False) as locked:
        locked.take_recipe(to_yaml(before, comments=False))
        return _train_in(locked, after, name, notes, quiet=quiet)


def against_published(recipe: Recipe) -> str | None:
    """In which keys that matter for what is learned a recipe differs from the publication; None where there is none."""
    name = recipe.method.published
    if name is None:
        return None
    lines = [line for line in diff(read(name), recipe) if line.startswith(_LEARNED)]
    if not lines:
        return f"recipe: equals the published one ({name})"
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return f"recipe: differs from the published one ({name}: published -> here) in {'; '.join(lines[:_SHOWN])}{more}"


def _train_in(directory: RunDirectory, recipe: Recipe, name: str, notes: Sequence[str], *, quiet: bool) -> Run:
    log = TextLog(directory.path, Silence(), owner=directory)
    console = open_console(quiet=quiet, log=log)
    for note in (*notes, *directory.notes):
        console.notice(note)
    if (line := against_published(recipe)) is not None:
        console.notice(line)
    sinks = open_sinks(recipe, name, directory.path, log, console)
    journal = Journal(directory.path, sinks, teller=console, owner=directory)
    device = choose_device(recipe.device)
    hardware = {"device": str(device), "chip": describe_device(device), "cores": num_cores()}
    hardware["threads"] = choose_threads(recipe.threads)
    resuming = bool(find_checkpoints(directory.checkpoints))
    teller = RunTeller(journal, console)
    backup = open_backup(recipe.backup, directory.path, resuming=resuming, teller=teller)
    before = directory.begin_session(recipe=name, seed=recipe.seed, hardware=hardware)
    if resuming and (line := describe_change(before.get("threads"), hardware["threads"])) is not None:
        console.notice(line)
    with backup:
        with (
            _session(directory, journal, console, device),
            computing(recipe.threads, device, teller),
            explain_torch_errors(recipe),
        ):
            with fitted(build_parts(recipe, teller), teller, resuming=resuming) as parts:
                run = assemble(parts, directory, teller, backup)
                state = fit(run)
            if run.checkpoints.newest_step != state.step:
                raise RunError(
                    f"{directory.path}: training is done, but its last checkpoint could not be written (see above): "
                    f"mend that, or make room; then opsin resume {directory.path} does again what was not saved"
                )
            _write_final(directory, state)
        # Before the last files are copied: these words are in one of them.
        console.finish(_last_words(directory, journal))
    return run


def open_sinks(recipe: Recipe, name: str, folder: Path, log: TextLog, teller: Teller) -> list[Sink]:
    """The copies of the journal that a recipe asks for. One whose package is missing is left out, with a notice."""
    wanted: dict[type[Sink], bool] = {
        CsvTable: recipe.log.csv,
        TensorBoard: recipe.log.tensorboard,
        TextLog: True,
        Plots: recipe.log.plots,
    }
    wanted.update((kind, True) for kind in subclasses(Sink) if kind.in_every_run)
    sinks: list[Sink] = []
    for kind in (kind for kind, is_wanted in wanted.items() if is_wanted):
        if kind.package is not None and importlib.util.find_spec(kind.package) is None:
            teller.notice(f"{kind.package} is not installed: {kind.name}/ is not written (pip install {kind.package})")
        else:
            sinks.append(log if kind is TextLog else kind(folder, teller))
    if recipe.alerts.webhook is not None:
        sinks.append(Webhook(folder, teller, webhook_url(recipe.alerts.webhook), recipe=name))
    return sinks


def _last_words(directory: RunDirectory, journal: Journal) -> str:
    """The directory of the run, its duration and its scores, in one line."""
    last = journal.last
    if last is None:  # its metrics.jsonl was removed, and no evaluator has begun a new one
        return f"{directory.path}: done"
    scores = {name: value for name, value in last.values.items() if name.endswith("/top1") and name != "train/top1"}
    words = [f"{directory.path}: done, {last.step} steps in {duration(last.time_s)}", describe(scores)]
    words += [_better(name, scores) for name in scores if f"{AVERAGED}/" in name]
    return "  ".join(word for word in words if word)


def _better(averaged: str, scores: Mapping[str, float]) -> str:
    """A sentence on the weights that score better, averaged or as trained."""
    raw = averaged.replace(f"{AVERAGED}/", "/")
    if scores[averaged] > scores.get(raw, -math.inf):
        return f"better by {raw}: the averaged weights (opsin export DIR --weights ema)"
    return f"better by {raw}: the weights as trained"


@contextmanager
def _session(directory: RunDirectory, journal: Journal, console: Console, device: torch.device) -> Iterator[None]:
    """Write down how the session ended, however it did."""
    status: Literal["done", "stopped", "failed"] = "failed"
    reason: str | None = None
    try:
        yield
        status = "done"
    except BaseException as error:
        status = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        reason = str(error) or type(error).__name__
        raise
    finally:
        console.finish()
        last = journal.last
        step, seconds = (0, 0.0) if last is None else (last.step, last.time_s)
        journal.event(status, step, reason=reason)
        journal.summarize(steps=step, seconds=seconds, peak_memory_bytes=peak_memory_bytes(device))
        try:
            directory.end_session(status, reason)
        except RunError as error:  # a full disk must not hide how training ended
            if str(error) != reason:
                console.warning(str(error))
        journal.close()  # waits for the last pictures: training is over before


def _write_final(directory: RunDirectory, state: TrainState) -> None:
    advice = f"the last checkpoint holds the weights: mend that, or make room; then opsin resume {directory.path}"
    with writing(directory.model, advice):
        # The averaged weights first: a directory with model.safetensors is whole.
        directory.averaged.unlink(missing_ok=True)
        if state.ema is not None:
            with state.ema.in_place():
                write_model(directory.averaged, state.method)
        write_model(directory.model, state.method)
