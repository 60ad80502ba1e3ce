"""One checkpoint on disk: what is in it, and how it is verified and read.

step-00000123/
├── state.pt         weights, optimizer state and loss scale: plain tensors and numbers (state.pt.zst: compressed)
└── manifest.json    format, step, training time, versions, and the sha256 of every file and of itself

Whatever has such a name is complete: `training/checkpoints/writer.py` writes under a hidden name and renames.
"""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from opsin.__version__ import __version__
from opsin.errors import CheckpointError
from opsin.storage.compression import SUFFIX, decompressed
from opsin.training.state import Detour, TrainState

FORMAT = 2
"""The newest format that this code reads: 1, or 2 for what an older opsin would misread (compression, detours)."""

STATE = "state.pt"
MANIFEST = "manifest.json"

_NAME = re.compile(r"step-(\d+)")
_OTHER_RECIPE = "undo the change of the recipe, or train into another --out"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that was complete once and is not what was written."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of a checkpoint. `method` and `optimizer` are state dicts."""

    step: int
    elapsed_s: float
    recipe: str
    """Fingerprint of the recipe that wrote it."""
    optimizer_name: str
    method: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    loss_scale: Mapping[str, Tensor] | None
    ema: Mapping[str, Tensor] | None
    """The averaged weights by name; none where the run keeps none."""
    detours: tuple[Detour, ...] = ()


@dataclass(frozen=True, slots=True)
class Restored:
    """The checkpoint that a run goes on from."""

    stored: Checkpoint | None
    """None where there is none: the run begins."""
    damaged: Mapping[Path, str]
    """Newer checkpoints that are damaged, with the fault of each."""


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in `folder` by step, oldest first; their content is not verified."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def read_manifest(path: Path) -> dict[str, Any]:
    """The facts about the checkpoint at `path`, verified.

    Raises:
        DamagedCheckpoint: it is missing or not what was written.
        CheckpointError: written by a newer opsin.
    """
    try:
        return _read_manifest(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _senseless(path, error) from error


def verify(path: Path, *, content: bool = True) -> dict[str, Any]:
    """The manifest of the checkpoint at `path` after all its files were compared with it.

    Without `content` only their sizes are, which takes no time.

    Raises:
        DamagedCheckpoint: a file is missing or not what was written.
        CheckpointError: written by a newer opsin.
    """
    manifest = read_manifest(path)
    try:
        for name, stored in manifest["files"].items():
            _verify(path, name, stored["bytes"], stored["sha256"] if content else None)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise _senseless(path, error) from error
    return manifest


def read_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> Checkpoint:
    """The verified content of the checkpoint at `path`, with its tensors on `map_location`.

    Raises:
        DamagedCheckpoint: a file is missing or not what was written.
        CheckpointError: written by a newer opsin.
    """
    manifest = verify(path)
    try:
        state: Path | IO[bytes] = path / STATE
        if STATE not in manifest["files"]:
            state = decompressed(path / f"{STATE}{SUFFIX}")
        content = torch.load(state, map_location=map_location, weights_only=True)
        return Checkpoint(
            step=manifest["step"],
            elapsed_s=manifest["elapsed_s"],
            recipe=manifest["recipe"],
            optimizer_name=manifest["optimizer"],
            method=content["method"],
            optimizer=content["optimizer"],
            loss_scale=content["loss_scale"],
            ema=content.get("ema"),
            detours=tuple(Detour(**detour) for detour in manifest.get("detours", ())),
        )
    except OSError as error:
        raise _unreadable(path, error) from error
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        raise _senseless(path, error) from error


def load_into(path: Path, state: TrainState) -> Checkpoint:
    """Put the checkpoint at `path` into `state`, on whatever device that is; training goes on bit for bit.

    Settings of the optimizer (weight decay, momentum) stay those of `state`. Gives what was read.

    Raises:
        DamagedCheckpoint: as `read_checkpoint`; the state is unchanged.
        CheckpointError: it does not fit the state, which is unchanged; or was written by a newer opsin.
    """
    stored = read_checkpoint(path)
    _check_fit(path, stored, state)
    state.method.load_state_dict(stored.method)
    # The stored groups are there to be compared only: the learning rate is a function of the step,
    # and every other setting one of the recipe, which a resume may have changed.
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": stored.optimizer["state"], "param_groups": groups})
    if state.loss_scale is not None and stored.loss_scale is not None:
        state.loss_scale.scale.copy_(stored.loss_scale["scale"])
        state.loss_scale.good_steps.copy_(stored.loss_scale["good_steps"])
    if state.ema is not None:
        # Weights that were not averaged so far are their own average.
        averages = state.method.state_dict() if stored.ema is None else stored.ema
        state.ema.load_state_dict({name: averages[name] for name in state.ema.state_dict()})
    state.step, state.elapsed_s, state.whole = stored.step, stored.elapsed_s, True
    state.detours = stored.detours
    return stored


def load_newest(folder: Path, state: TrainState) -> Restored:
    """Put the newest valid checkpoint in `folder` into `state`, passing over damaged ones.

    Raises:
        CheckpointError: all are damaged (a line for each); one does not fit, or was written by a newer opsin.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(find_checkpoints(folder).values()):
        try:
            return Restored(load_into(path, state), damaged)
        except DamagedCheckpoint as error:
            damaged[path] = str(error)
    if damaged:
        raise CheckpointError(
            *damaged.values(),
            f"{folder}: no valid checkpoint is left; fetch one from the backup of the run, if it has any: "
            "opsin restore URL OTHER_DIR; or start over with --fresh",
        )
    return Restored(None, damaged)


def digest(facts: Mapping[str, Any]) -> str:
    """The sha256 of a manifest without its own."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
    written = facts.pop("sha256", None)
    # Before the hash: what a newer manifest hashes is not known here.
    if isinstance(facts["format"], int) and facts["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: too new: format {facts['format']}, this opsin {__version__} reads up to {FORMAT}; upgrade opsin"
        )
    if written != digest(facts):
        raise DamagedCheckpoint(f"{path}: {MANIFEST}: does not have the sha256 that it states")
    return facts


def _verify(path: Path, name: str, size: int, sha256: str | None) -> None:
    with (path / name).open("rb") as file:
        found_size = os.fstat(file.fileno()).st_size
        if found_size != size:
            raise DamagedCheckpoint(f"{path}: {name}: has {found_size} bytes, {size} were written")
        found = None if sha256 is None else hashlib.file_digest(file, "sha256").hexdigest()
    if found is not None and sha256 is not None and found != sha256:
        raise DamagedCheckpoint(f"{path}: {name}: sha256 is {found[:12]}..., {sha256[:12]}... was written")


def _unreadable(path: Path, error: OSError) -> DamagedCheckpoint:
    name = Path(error.filename or STATE).name
    return DamagedCheckpoint(f"{path}: {name}: cannot be read: {error.strerror or error}")


def _senseless(path: Path, error: Exception) -> DamagedCheckpoint:
    reason = str(error).partition("\n")[0]
    return DamagedCheckpoint(f"{path}: cannot be read: {type(error).__name__}: {reason}")


def _check_fit(path: Path, stored: Checkpoint, state: TrainState) -> None:
    own = state.method.state_dict()
    faults = {
        "missing": [name for name in own if name not in stored.method],
        "unexpected": [name for name in stored.method if name not in own],
        "of another shape": [n for n, v in stored.method.items() if n in own and own[n].shape != v.shape],
    }
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{path}: does not fit the model: {', '.join(names[:3])}{more} {fault}; {_OTHER_RECIPE}"
            )
    name = type(state.optimizer).__name__
    if name != stored.optimizer_name:
        raise CheckpointError(f"{path}: holds the state of {stored.optimizer_name}, not of {name}; {_OTHER_RECIPE}")
    sizes = [len(group["params"]) for group in state.optimizer.param_groups]
    stored_sizes = [len(group["params"]) for group in stored.optimizer["param_groups"]]
    if sizes != stored_sizes:
        raise CheckpointError(f"{path}: parameter groups of {stored_sizes} tensors, not of {sizes}; {_OTHER_RECIPE}")
