"""One checkpoint on disk: written whole or not at all, and verified when it is read.

step-00000123/
├── state.pt         weights, optimizer state and loss scale: plain tensors and numbers
└── manifest.json    format, step, training time, versions, and the sha256 of every file and of itself

A checkpoint is written under a hidden name, synced, then renamed: whatever has the final name is complete.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsin import __version__
from opsin.errors import CheckpointError
from opsin.rundir import sync_folder
from opsin.training.state import TrainState

FORMAT = 1
"""The newest format that this code reads, and the one that it writes."""

_NAME = re.compile(r"step-(\d+)")
_STATE = "state.pt"
_MANIFEST = "manifest.json"
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


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in `folder` by step, oldest first; their content is not verified."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def write_checkpoint(folder: Path, state: TrainState, *, recipe: str) -> Path:
    """`folder/step-N` with the whole of `state`; survives a power cut once this returns.

    Raises:
        OSError: it cannot be written (a full disk, say); nothing of it is left.
    """
    assert state.whole, "weights and moments belong to different steps"
    path = folder / f"step-{state.step:08d}"
    partial = folder / f".writing-{state.step}-{os.getpid()}"
    if not folder.exists():
        folder.mkdir(parents=True)
        sync_folder(folder.parent)
    try:
        partial.mkdir()
        facts = {
            "format": FORMAT,
            "step": state.step,
            "elapsed_s": state.elapsed_s,
            "opsin": __version__,
            "torch": torch.__version__,
            "recipe": recipe,
            "optimizer": type(state.optimizer).__name__,
            "files": {_STATE: _write_state(partial / _STATE, state)},
        }
        text = json.dumps({**facts, "sha256": _digest(facts)}, indent=2) + "\n"
        with _SyncedFile(partial / _MANIFEST) as file:
            file.write(text.encode())
        sync_folder(partial)
        if path.exists():
            remove_checkpoint(path)
        partial.rename(path)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def read_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> Checkpoint:
    """The verified content of the checkpoint at `path`, with its tensors on `map_location`.

    Raises:
        DamagedCheckpoint: a file is missing or not what was written.
        CheckpointError: written by a newer opsin.
    """
    try:
        manifest = _read_manifest(path)
        for name, stored in manifest["files"].items():
            _verify(path, name, stored["bytes"], stored["sha256"])
        content = torch.load(path / _STATE, map_location=map_location, weights_only=True)
        return Checkpoint(
            step=manifest["step"],
            elapsed_s=manifest["elapsed_s"],
            recipe=manifest["recipe"],
            optimizer_name=manifest["optimizer"],
            method=content["method"],
            optimizer=content["optimizer"],
            loss_scale=content["loss_scale"],
            ema=content.get("ema"),
        )
    except OSError as error:
        name = Path(error.filename or _STATE).name
        raise DamagedCheckpoint(f"{path}: {name}: cannot be read: {error.strerror or error}") from error
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise DamagedCheckpoint(f"{path}: cannot be read: {type(error).__name__}: {reason}") from error


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
    return stored


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; killed in the middle, no half of it is left under its name.

    Raises:
        OSError: it cannot be deleted.
    """
    doomed = path.with_name(f".removing-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half written or half removed. Only for the one that holds the run's lock."""
    for pattern in (".writing-*", ".removing-*"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
    for file in folder.glob(".*.writing"):
        file.unlink(missing_ok=True)


def size_bytes(state: TrainState) -> int:
    """Bytes that a checkpoint of `state` takes on disk, but for a few KiB."""
    moments = (value for entry in state.optimizer.state.values() for value in entry.values())
    averages = {} if state.ema is None else state.ema.state_dict()
    tensors = [
        *state.method.state_dict().values(),
        *averages.values(),
        *(value for value in moments if isinstance(value, Tensor)),
    ]
    return sum(tensor.nbytes for tensor in tensors)


class _SyncedFile:
    """A new file, hashed while it is written and synced when closed.

    An error waits until the file is closed: torch writes from C++, where none may pass through.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._error: OSError | None = None
        self._bytes = 0

    @property
    def entry(self) -> dict[str, str | int]:
        """What the manifest says about the file."""
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}

    def __enter__(self) -> "_SyncedFile":
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            if self._error is None:
                os.fsync(self._file.fileno())
        if self._error is not None:
            raise self._error

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        self._sha256.update(rest)
        self._bytes += size
        try:
            while rest and self._error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error
        return size

    def flush(self) -> None:
        pass


def _write_state(path: Path, state: TrainState) -> dict[str, str | int]:
    scale = state.loss_scale
    content = {
        "method": dict(state.method.state_dict()),
        "optimizer": state.optimizer.state_dict(),
        "loss_scale": None if scale is None else {"scale": scale.scale, "good_steps": scale.good_steps},
        "ema": None if state.ema is None else state.ema.state_dict(),
    }
    with _SyncedFile(path) as file:
        torch.save(content, file)  # type: ignore[arg-type]  # it asks for `write` and `flush` only
    return file.entry


def _read_manifest(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((path / _MANIFEST).read_bytes())
    written = facts.pop("sha256", None)
    # Before the hash: what a newer manifest hashes is not known here.
    if isinstance(facts["format"], int) and facts["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: too new: format {facts['format']}, this opsin {__version__} reads up to {FORMAT}; upgrade opsin"
        )
    if written != _digest(facts):
        raise DamagedCheckpoint(f"{path}: {_MANIFEST}: does not have the sha256 that it states")
    return facts


def _verify(path: Path, name: str, size: int, sha256: str) -> None:
    with (path / name).open("rb") as file:
        found_size = os.fstat(file.fileno()).st_size
        if found_size != size:
            raise DamagedCheckpoint(f"{path}: {name}: has {found_size} bytes, {size} were written")
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DamagedCheckpoint(f"{path}: {name}: sha256 is {found[:12]}..., {sha256[:12]}... was written")


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


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
