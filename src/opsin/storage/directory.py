"""The run directory: its files, and the lock that lets one process write them.

DIR/
├── recipe.yaml          the effective recipe; training it does the run again
├── run.json             status, seed, versions, git commit, hardware, sessions
├── metrics.jsonl        what was measured, one JSON object per line
├── events.jsonl         what happened, one JSON object per line
├── summary.json         last and best of each score, steps, seconds, peak memory
├── quarantine.txt       images that could not be read
├── put_aside.json       excluded images: training crashed while reading them
├── splits.json          steps from which batches are computed in more parts, after memory ran out
├── checkpoints/         step-00000123/, ...
├── plots/               pictures
├── maps/                pictures of masks, errors and attention (with an evaluator `maps`)
├── profile/             the time of single steps: split.json, split.png, trace.json (with profile.steps)
├── model.safetensors    the final weights
└── .lock                held by the process that writes the run
"""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from opsin.__version__ import __version__
from opsin.errors import RunError
from opsin.storage.files import remove_leftovers, write_atomic, writing
from opsin.storage.lock import RunLock
from opsin.storage.records import RecordFormat

_PACKAGES = ("torch", "torchvision", "torchcodec", "timm", "numpy", "pillow", "pydantic", "safetensors")
_UNWRITTEN = "choose another folder with --out, or make room for this one"


@dataclass(frozen=True, slots=True)
class _RunFacts:
    """The part of `run.json` that is read again."""

    recipe: str
    sessions: list[dict[str, Any]]


_RUN_FACTS = RecordFormat(_RunFacts)


class RunDirectory:
    """The files of a run by name. Made by `prepare` or `locked` it holds the lock, until `close` or `with` ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.run_json = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.summary = path / "summary.json"
        self.quarantine = path / "quarantine.txt"
        self.excluded = path / "put_aside.json"
        self.splits = path / "splits.json"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.profile = path / "profile"
        self.model = path / "model.safetensors"
        self.averaged = path / "model_ema.safetensors"
        self.notes: list[str] = []
        """Sentences for people on how the lock was taken, and on the earlier run."""
        self._lock = RunLock(path / ".lock")
        self._facts: dict[str, Any] = {}

    @classmethod
    def prepare(cls, path: Path, *, fresh: bool) -> Self:
        """Return the directory at `path`, locked: a new one, or that of a run to be continued.

        `fresh` moves an existing run to `DIR.before-1` (or the next free number), beside the folder that `path` links
        to if it is a link.

        Raises:
            RunError: it cannot be written, holds other files than a run, or is in use.
        """
        run = cls(path)
        with writing(path, _UNWRITTEN):
            try:
                path.mkdir(parents=True, exist_ok=True)
                run._check_foreign()
                run._take_lock()
                if fresh and run.exists():
                    run.notes.append(f"{path}: the earlier run was moved to {run._move_away()}")
                    run._take_lock()
                for leftover in path.glob(".*.writing"):
                    leftover.unlink(missing_ok=True)
            except BaseException:
                run.close()
                raise
        return run

    @classmethod
    def locked(cls, path: Path) -> Self:
        """Return the directory of an existing run, locked; what a killed process left unfinished in it is completed.

        Raises:
            RunError: another process is writing it.
            OSError: the lock cannot be written.
        """
        run = cls(path)
        try:
            run._take_lock()
        except BaseException:
            run.close()
            raise
        return run

    def take_recipe(self, text: str, *, differences: Sequence[str] = ()) -> None:
        """Write the effective recipe. `differences` from the recipe that is there forbid to continue its run.

        Raises:
            RunError: there are differences, one line each; or the file cannot be written.
        """
        if differences:
            raise RunError(
                f"{self.path}: holds a run of another recipe",
                *(f"{self.recipe}: {line}" for line in differences),
                f"choose another --out, start over with --fresh (the earlier run is kept), "
                f"or go on with changed keys: opsin resume {self.path} key=value",
            )
        with writing(self.path, _UNWRITTEN):
            write_atomic(self.recipe, text.encode())

    def exists(self) -> bool:
        """True if a run was begun here."""
        return self.recipe.exists() or self.run_json.exists()

    def recipe_name(self) -> str | None:
        """The name of the recipe that the run began with; None before its first session.

        Raises:
            RunError: `run.json` is damaged.
        """
        facts = self._earlier_facts()
        return None if facts is None else facts.recipe

    def check_held(self) -> None:
        """Check that this process still holds the lock; cheap enough for every row.

        Raises:
            LockLost: another process has taken it over and writes the run.
        """
        self._lock.check()

    def close(self) -> None:
        """Let other processes write this run."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin_session(self, *, recipe: str, seed: int, hardware: Mapping[str, object]) -> Mapping[str, object]:
        """Record in `run.json` that this process trains the run; a resume adds a session to those before.

        `hardware` holds plain facts without the name of the machine. That of the session before is returned; it is
        empty if there was none.

        Raises:
            RunError: `run.json` is damaged or cannot be written.
        """
        earlier = self._earlier_facts()
        sessions = [] if earlier is None else earlier.sessions
        for session in sessions:
            if session.get("status") == "running":
                session["status"] = "killed"
        now = {"status": "running", "started": _now(), "ended": None, "reason": None}
        about = {"versions": installed_versions(), "git": git_state(), "hardware": dict(hardware)}
        self._facts = {"recipe": recipe, "seed": seed, "sessions": [*sessions, {**now, **about}]}
        self._write_facts()
        return dict(sessions[-1].get("hardware") or {}) if sessions else {}

    def end_session(self, status: Literal["done", "stopped", "failed"], reason: str | None = None) -> None:
        """Record how the session that `begin_session` began has ended.

        Raises:
            RunError: `run.json` cannot be written.
            LockLost: another process holds the lock.
        """
        assert self._facts, "no session was begun"
        self.check_held()
        self._facts["sessions"][-1].update(status=status, ended=_now(), reason=reason)
        self._write_facts()

    def _take_lock(self) -> None:
        """Take the lock, and complete what an earlier process left unfinished: every checkpoint is visible then."""
        self.notes += self._lock.take()
        remove_leftovers(self.checkpoints)

    def _check_foreign(self) -> None:
        # Hidden names are ours (the lock, a file half written when the power went) or the system's.
        others = sorted(item.name for item in self.path.iterdir() if not item.name.startswith("."))
        if others and not self.exists():
            raise RunError(
                f"{self.path}: holds {len(others)} other files ({others[0]}, ...) and no run; "
                "choose an empty or a new folder with --out"
            )

    def _move_away(self) -> Path:
        """Rename the run, and make an empty folder of its old name; return the new path of the run."""
        # A link stays, and still leads to the disk that was chosen for the run.
        folder = self.path.resolve() if self.path.is_symlink() else self.path
        number = 1
        while (target := folder.with_name(f"{folder.name}.before-{number}")).exists():
            number += 1
        folder.rename(target)
        folder.mkdir()
        return target

    def _earlier_facts(self) -> _RunFacts | None:
        try:
            return _RUN_FACTS.read(self.run_json, "delete it to go on without its history")
        except FileNotFoundError:
            return None

    def _write_facts(self) -> None:
        sessions = self._facts["sessions"]
        facts = {**self._facts, **sessions[-1], "started": sessions[0]["started"], "sessions": sessions}
        with writing(self.run_json, _UNWRITTEN):
            write_atomic(self.run_json, (json.dumps(facts, indent=2) + "\n").encode())


def spelled_out(path: Path) -> Path:
    """Return `path`, in full if it ends in `.` or `..`: such a path leads elsewhere once its folder has moved."""
    return path if path.name not in ("", "..") else path.resolve()


def installed_versions() -> dict[str, str | None]:
    """Versions of Python, opsin and the packages that numbers depend on; None for one that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version(), "opsin": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state() -> dict[str, str | bool] | None:
    """Return the commit of the working directory, and True if tracked files differ from it; None outside git."""
    commit, changes = _git("rev-parse", "--verify", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
