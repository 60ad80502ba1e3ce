"""One checkpoint on disk: its content, verified and read.

step-00000123/
├── state.pt         weights, optimizer state and loss scale: plain tensors and numbers (state.pt.zst: compressed)
└── manifest.json    format, step, training time, versions, and the sha256 of every file and of itself

A folder of such a name is complete: `training/checkpoints/writer.py` writes under a hidden name and renames.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

from opsin.__version__ import __version__
from opsin.errors import CheckpointError
from opsin.storage.compression import SUFFIX, decompressed
from opsin.storage.files import reason_of
from opsin.training.state import Detour, TrainState

FORMAT = 2
"""The newest format that this code reads: 1, or 2 for what an older opsin would misread (compression, detours)."""

STATE = "state.pt"
MANIFEST = "manifest.json"

_NAME = re.compile(r"step-(\d+)")
_OTHER_RECIPE = "undo the change of the recipe, or train into another --out"


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that was complete and has changed since."""


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
    """The averaged weights by name; None if the run has none."""
    detours: tuple[Detour, ...] = ()


@dataclass(frozen=True, slots=True)
class Restored:
    """The checkpoint from which a run resumes."""

    stored: Checkpoint | None
    """None if there is no checkpoint: the run begins."""
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
    """The verified facts about the checkpoint at `path`.

    Raises:
        DamagedCheckpoint: the manifest is missing or has changed.
        CheckpointError: written by a newer opsin.
    """
    with _reading(path):
        facts: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        written = facts.pop("sha256", None)
        # Before the hash: what a newer manifest hashes is not known here.
        if isinstance(facts["format"], int) and facts["format"] > FORMAT:
            newest = f"this opsin {__version__} reads up to {FORMAT}"
            raise CheckpointError(f"{path}: too new: format {facts['format']}, {newest}; upgrade opsin")
        if written != digest(facts):
            raise DamagedCheckpoint(f"{path}: {MANIFEST}: does not have the sha256 that it states")
        return facts


def verify(path: Path, *, content: bool = True) -> dict[str, Any]:
    """Return the manifest of the checkpoint at `path` after comparing all its files with it.

    Without `content` only their sizes are compared, which takes no time.

    Raises:
        DamagedCheckpoint: a file is missing or has changed.
        CheckpointError: written by a newer opsin.
    """
    manifest = read_manifest(path)
    with _reading(path):
        for name, stored in manifest["files"].items():
            _verify(path, name, stored["bytes"], stored["sha256"] if content else None)
    return manifest


def read_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> Checkpoint:
    """The verified content of the checkpoint at `path`, with its tensors on `map_location`.

    Raises:
        DamagedCheckpoint: a file is missing or has changed.
        CheckpointError: written by a newer opsin.
    """
    manifest = verify(path)
    with _reading(path):
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


def load_into(path: Path, state: TrainState) -> Checkpoint:
    """Load the checkpoint at `path` into `state`, on any device, and return it; training goes on bit for bit.

    Settings of the optimizer (weight decay, momentum) stay those of `state`.

    Raises:
        DamagedCheckpoint: as `read_checkpoint`; the state is unchanged.
        CheckpointError: it does not fit the state, which is unchanged; or was written by a newer opsin.
    """
    stored = read_checkpoint(path)
    _check_fit(path, stored, state)
    state.method.load_state_dict(stored.method)
    # The stored groups are only compared: the learning rate is a function of the step, and every other setting is one
    # of the recipe, which a resume may have changed.
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": stored.optimizer["state"], "param_groups": groups})
    if state.loss_scale is not None and stored.loss_scale is not None:
        state.loss_scale.scale.copy_(stored.loss_scale["scale"])
        state.loss_scale.good_steps.copy_(stored.loss_scale["good_steps"])
    if state.ema is not None:
        # Without averages so far, the weights are their own average.
        averages = state.method.state_dict() if stored.ema is None else stored.ema
        state.ema.load_state_dict({name: averages[name] for name in state.ema.state_dict()})
    state.step, state.elapsed_s, state.whole = stored.step, stored.elapsed_s, True
    state.detours = stored.detours
    return stored


def load_newest(folder: Path, state: TrainState) -> Restored:
    """Load the newest valid checkpoint in `folder` into `state`; damaged ones are skipped.

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
    """The sha256 of a manifest, which is stored with it."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _verify(path: Path, name: str, size: int, sha256: str | None) -> None:
    with (path / name).open("rb") as file:
        found_size = os.fstat(file.fileno()).st_size
        if found_size != size:
            raise DamagedCheckpoint(f"{path}: {name}: has {found_size} bytes, {size} were written")
        if sha256 is not None and (found := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
            raise DamagedCheckpoint(f"{path}: {name}: sha256 is {found[:12]}..., {sha256[:12]}... was written")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged checkpoint into DamagedCheckpoint."""
    try:
        yield
    except OSError as error:
        name = Path(error.filename or STATE).name
        raise DamagedCheckpoint(f"{path}: {name}: cannot be read: {reason_of(error)}") from error
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise DamagedCheckpoint(f"{path}: cannot be read: {type(error).__name__}: {reason}") from error


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
