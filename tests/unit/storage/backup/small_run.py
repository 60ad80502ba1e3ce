"""A run directory without a training: files, and checkpoints with manifests as the trainer writes them."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from opsin.storage.backup.config import BackupConfig
from opsin.storage.backup.mirror import Mirror
from opsin.storage.backup.service import open_mirror
from opsin.storage.files import put_in_place
from tests.story import Story


def write_checkpoint(folder: Path, step: int, content: bytes | None = None) -> Path:
    """`folder/checkpoints/step-N` with a state of a few KiB that says which step it is of."""
    content = f"state {step} ".encode() * 500 if content is None else content
    path = folder / "checkpoints" / f"step-{step:08d}"
    partial = path.with_name(f".writing-{path.name}")
    partial.mkdir(parents=True)
    (partial / "state.pt").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (partial / "manifest.json").write_text(json.dumps({"step": step, "files": {"state.pt": entry}}))
    put_in_place(partial, path)
    return path


def write_run(folder: Path, *steps: int) -> Path:
    """A run directory with these checkpoints."""
    (folder / "plots").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("seed: 0\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "events.jsonl").write_text('{"step": 1, "kind": "x"}\n')
    (folder / "plots" / "loss.png").write_bytes(b"\x89PNG" + bytes(100))
    (folder / ".lock").write_text("1\n")
    for step in steps:
        write_checkpoint(folder, step)
    return folder


def mirror(folder: Path, place: Path | str, **keys: object) -> Mirror:
    """What copies `folder` to `place`."""
    config = BackupConfig.model_validate({"path": str(place), **keys})
    return open_mirror(config, folder, cancelled=threading.Event())


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but hidden ones, by name."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not any(part.startswith(".") for part in name.split("/"))}


class Quiet(Story):
    """A teller for work without anything to report: every line fails the test."""

    def notice(self, text: str) -> None:
        raise AssertionError(text)

    warning = notice


class Interrupted(Exception):
    """The machine went down."""


def interrupting(send: Callable[..., None], name: str) -> Callable[..., None]:
    """`BackupStore.put` that fails in the middle of the file whose name ends with `name`."""

    def put(target: str, chunks: Iterator[bytes], *, size: int, sha256: str) -> None:
        if target.endswith(name):
            next(chunks)
            raise Interrupted
        send(target, chunks, size=size, sha256=sha256)

    return put
