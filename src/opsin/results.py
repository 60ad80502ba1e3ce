"""What a finished or running run gives back: scores, an encoder, an export.

A place is a run directory (its final weights, else its newest valid checkpoint), a checkpoint inside
one, or an export folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin.assembly import build_method, choose_numbers, open_images, place, settle_numerics, still_data
from opsin.console import open_console
from opsin.errors import CheckpointError, ConfigError, RunError
from opsin.evaluation.accuracy import AccuracyReport, Classifier, evaluate
from opsin.export import (
    BACKBONE_FILE,
    CARD_FILE,
    Encoder,
    build_networks,
    export_encoder,
    load_export,
    read_card,
)
from opsin.recipe import read
from opsin.rundir import RunDirectory
from opsin.training.checkpoint import DamagedCheckpoint, find_checkpoints, read_checkpoint
from opsin.training.precision import autocast

Weights = Literal["raw", "ema"]
"""Those that were trained, or their moving average."""


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


def evaluate_run(path: Path, *, weights: Weights = "raw") -> AccuracyReport:
    """The accuracy of a run, or of one of its checkpoints, on the validation images of its recipe.

    Raises:
        RunError: no run at `path`.
        ConfigError: the run is no classifier, or its recipe has no validation images.
    """
    run, checkpoint = _find_run(path)
    recipe = read(str(run.recipe))
    console = open_console(quiet=True)
    device, number_format = choose_numbers(recipe, console.notice)
    images = open_images(recipe, console.notice)
    method = build_method(recipe, images.facts)
    state, source = _read_weights(run, checkpoint, weights)
    _take(method, state, "", source)
    numerics = settle_numerics(recipe, method, device, number_format, console.notice)
    method = place(method, numerics)
    still = still_data(recipe, images, numerics, console)
    if still is None:
        raise ConfigError(f"{run.recipe}: has no validation images; set data.holdout, or give the data a split")
    if not isinstance(method, Classifier):
        raise ConfigError(f"{run.recipe}: method.name={recipe.method.name} gives no class scores; accuracy needs them")
    return evaluate(method, still, autocast=autocast(device, number_format), device=device)


def export_run(path: Path, out: Path | None, *, weights: Weights = "raw") -> Path:
    """Write the encoder of a run to `out` (`DIR/export` if None); gives the folder.

    Raises:
        RunError: no run at `path`, or `out` cannot be written.
    """
    encoder = load(path, weights=weights)
    folder = out or _find_run(path)[0].path / "export"
    try:
        export_encoder(folder, encoder.card, encoder.backbone, encoder.head)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}; choose another with --out") from error
    return folder


def _find_run(path: Path) -> tuple[RunDirectory, Path | None]:
    """The run directory at `path`, or above the checkpoint at `path`, with that checkpoint."""
    if RunDirectory(path).exists():
        return RunDirectory(path), None
    above = RunDirectory(path.parent.parent)
    if path.parent == above.checkpoints and path.is_dir() and above.exists():
        return above, path
    raise RunError(f"{path}: is no run directory and no checkpoint of one; `opsin runs` lists those in a folder")


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
    way_out = "give the run directory for its other weights" if checkpoint else "train it anew with --fresh"
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
