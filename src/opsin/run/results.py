"""Results of a finished or running run: scores, an encoder, an export.

A path is that of a run directory (its final weights, else its newest valid checkpoint), a checkpoint inside
one, or an export folder.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin.data.sources.open import open_sources
from opsin.errors import CheckpointError, ConfigError, DataError, RunError
from opsin.evaluation.accuracy import Accuracy, AccuracyConfig, Classifier
from opsin.evaluation.knn import KnnConfig
from opsin.evaluation.linear import LinearConfig
from opsin.evaluation.maps import MapsConfig
from opsin.export.encoder import (
    BACKBONE_FILE,
    CARD_FILE,
    Encoder,
    build_networks,
    export_encoder,
    load_export,
    read_card,
)
from opsin.methods.base import Method
from opsin.reporting.console import Console, open_console
from opsin.run.assemble import temporary_run
from opsin.run.images import Images, evaluation_context, loading_plan
from opsin.run.parts import build_parts
from opsin.run.recipe import Recipe, read
from opsin.run.threads import computing
from opsin.storage.directory import RunDirectory
from opsin.storage.files import writing
from opsin.training.checkpoints.format import DamagedCheckpoint, find_checkpoints, read_checkpoint
from opsin.training.evaluator import EvaluationContext

Weights = Literal["raw", "ema"]
"""Those that were trained, or their moving average."""

ScoreName = Literal["accuracy", "knn", "linear", "maps"]
"""Scores that a run can get."""


def load(path: str | Path, *, weights: Weights = "raw") -> Encoder:
    """The encoder in an export folder, a run directory or a checkpoint; on the CPU, ready for images.

    `weights` chooses those of a run; an export folder has one kind.

    Raises:
        RunError: there is none of these at `path`.
        CheckpointError: the weights are damaged, of a newer opsin, or of another network.
    """
    folder = Path(path)
    if (folder / BACKBONE_FILE).exists():
        return load_export(folder)
    run, checkpoint = _find_run(folder)
    state, source = _read_weights(run, checkpoint, weights)
    card = read_card(run.path / CARD_FILE)
    backbone, head = build_networks(card)
    _take(backbone, state, "backbone.", source)
    if head is not None:
        _take(head, state, "head.", source)
    return Encoder(card, backbone, head)


class Report(Protocol):
    """A score and what it is made from."""

    def lines(self) -> list[str]:
        """For a reader."""
        ...

    def as_dict(self) -> dict[str, object]:
        """The same as plain values for JSON."""
        ...


def evaluate_run(
    path: Path,
    scores: Sequence[ScoreName] = (),
    *,
    weights: Weights | Literal["initial"] = "raw",
    data: str | None = None,
    blocks: int | None = None,
) -> dict[ScoreName, Report]:
    """The scores of a run, or of one of its checkpoints, by name.

    None named means accuracy where the method gives class scores, else knn and linear; `maps` are pictures, written
    into DIR/maps. Each has the settings of the recipe's first evaluator of that kind, or the defaults, but no limit
    of time. They are taken on the validation images of the recipe, or of `data`, which is what `data.path` could be.
    The weights `initial` are those before step 0; `blocks` is how many last blocks' features knn and linear score.

    Raises:
        RunError: no run at `path`.
        ConfigError: a score that the method or the images do not allow.
    """
    run, checkpoint = _find_run(path)
    recipe = read(str(run.recipe))
    teller = open_console(quiet=True)
    parts = build_parts(recipe, teller)
    images, method, numerics = parts.images, parts.method, parts.numerics
    if weights == "initial":
        state, source = _initial_weights(recipe, teller), run.recipe
    else:
        state, source = _read_weights(run, checkpoint, weights)
    _take(method, state, "", source)
    if data is not None:
        images = _with_queries(images, data, recipe)
    context = evaluation_context(recipe, images, numerics, loading_plan(recipe, images, numerics, teller), run.path)
    features: tuple[ScoreName, ...] = ("knn", "linear")
    names = scores or (("accuracy",) if isinstance(method, Classifier) else features)
    if blocks is not None and not set(names) & set(features):
        raise ConfigError(
            f"--blocks {blocks}: {' and '.join(names)} cannot use it; name knn or linear, or leave it out"
        )
    reports: dict[ScoreName, Report] = {}
    with context.features.weights_unchanged(), computing(recipe.threads, numerics.device, teller):
        for name in names:
            if name == "accuracy":
                reports[name] = _score_classes(method, context, images.facts.classes, run.recipe)
            elif name == "maps":
                stem = (
                    source.name if source.parent == run.checkpoints else "initial" if weights == "initial" else "final"
                )
                reports[name] = _draw_maps(method, context, recipe, f"{stem}-ema" if weights == "ema" else stem)
            else:
                reports[name] = _score_features(method, context, recipe, name, data, blocks)
    return reports


def _score_classes(method: Method, context: EvaluationContext, classes: Sequence[str], path: Path) -> Report:
    if not isinstance(method, Classifier):
        raise ConfigError(f"{path}: this method has no classifier; score it with knn or linear")
    if context.validation is None:
        raise ConfigError(f"{path}: has no validation images; set data.holdout, or give the data a split")
    found = context.validation.facts.classes
    if found and found != tuple(classes):
        strange = ", ".join(sorted(set(found) ^ set(classes))[:3])
        raise ConfigError(
            f"--data: these images have {len(found)} classes, the run {len(classes)}, and they differ ({strange}); "
            "accuracy needs equal ones: take knn and linear"
        )
    return Accuracy(AccuracyConfig(), context).report(method)


def _score_features(
    method: Method,
    context: EvaluationContext,
    recipe: Recipe,
    name: Literal["knn", "linear"],
    data: str | None,
    blocks: int | None,
) -> Report:
    kind = KnnConfig if name == "knn" else LinearConfig
    found = ((key, config) for key, config in recipe.evaluators.items() if isinstance(config, kind))
    key, config = next(found, (name, kind()))
    asked = {"path": data, "blocks": blocks}
    changed = {"seconds": None} | {name: value for name, value in asked.items() if value is not None}
    wanted = config.model_copy(update=changed)
    wanted.check(method, key)
    return wanted.build(context, key).report(method)


def _draw_maps(method: Method, context: EvaluationContext, recipe: Recipe, name: str) -> Report:
    found = ((key, config) for key, config in recipe.evaluators.items() if isinstance(config, MapsConfig))
    key, config = next(found, ("maps", MapsConfig()))
    config.check(method, key)
    with writing(context.folder / "maps", "make room there"):
        return config.build(context, key).report(method, name)


def _with_queries(images: Images, path: str, recipe: Recipe) -> Images:
    """With other images to score, those at `path`: its validation images, or all if it has none."""
    try:
        opened = open_sources(path, cache=Path(os.path.expanduser(recipe.data.cache)))
    except DataError as error:
        raise ConfigError(*(f"--data {fault}" for fault in error.faults)) from error
    return replace(images, val=opened.train if opened.val is None else opened.val)


def export_run(path: Path, out: Path | None, *, weights: Weights = "raw") -> Path:
    """Write the encoder of a run to `out` (`DIR/export` if None); gives the folder.

    Raises:
        RunError: no run at `path`, or `out` cannot be written.
    """
    encoder = load(path, weights=weights)
    folder = out or _find_run(path)[0].path / "export"
    with writing(folder, "choose another with --out"):
        export_encoder(folder, encoder.card, encoder.backbone, encoder.head)
    return folder


def _find_run(path: Path) -> tuple[RunDirectory, Path | None]:
    """The run directory at `path`, or above the checkpoint at `path`, with that checkpoint."""
    if RunDirectory(path).exists():
        return RunDirectory(path), None
    above = RunDirectory(path.parent.parent)
    if path.parent == above.checkpoints and path.is_dir() and above.exists():
        return above, path
    raise RunError(f"{path}: is no run directory and no checkpoint of one; `opsin runs` lists those in a folder")


def _initial_weights(recipe: Recipe, console: Console) -> Mapping[str, Tensor]:
    """The weights that the run began with."""
    bare = recipe.model_copy(update={"evaluators": {}, "monitors": {}})
    with temporary_run(bare, console) as run:
        return run.start.fresh().method.state_dict()


def _read_weights(run: RunDirectory, checkpoint: Path | None, weights: Weights) -> tuple[Mapping[str, Tensor], Path]:
    """Final weights, else those of the newest valid checkpoint; and where they come from."""
    final = run.averaged if weights == "ema" else run.model
    if checkpoint is None and final.exists():
        try:
            return load_file(final), final
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{final}: is damaged ({error}); delete it to use the checkpoints") from error
    paths = [checkpoint] if checkpoint else list(reversed(find_checkpoints(run.checkpoints).values()))
    faults = []
    for path in paths:
        try:
            stored = read_checkpoint(path, torch.device("cpu"))
        except DamagedCheckpoint as fault:
            faults.append(str(fault))
            continue
        if weights == "raw":
            return stored.method, path
        if stored.ema is None:
            raise ConfigError(f"{path}: holds no averaged weights; use --weights raw, or train with ema.decay=0.999")
        # What is not averaged (counters) is as it was trained.
        return {**stored.method, **stored.ema}, path
    if not faults:
        raise CheckpointError(f"{run.path}: holds no weights yet; train it first: opsin resume {run.path}")
    way_out = "give the run directory for its other weights" if checkpoint else "start over with --fresh"
    raise CheckpointError(*faults, f"{run.path}: no valid weights; {way_out}")


def _take(module: nn.Module, state: Mapping[str, Tensor], prefix: str, source: Path) -> None:
    part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(part)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"{source}: does not fit the recipe beside it ({reason}); undo the change of recipe.yaml or encoder.json"
        ) from error
