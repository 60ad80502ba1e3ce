"""The run directory: what each file is, who may write it, and how a file is replaced whole.

DIR/
├── recipe.yaml          the effective recipe; training it does the run again
├── run.json             status, seed, versions, git commit, hardware, sessions
├── metrics.jsonl        what was measured, one JSON object per line
├── events.jsonl         what happened, one JSON object per line
├── summary.json         last and best of each score, steps, seconds, peak memory
├── quarantine.txt       images that could not be read
├── put_aside.json       images that are not read because training crashed with them
├── splits.json          from which steps on batches are in more parts, where memory ended
├── checkpoints/         step-00000123/, ...
├── plots/               pictures
├── maps/                what it sees, predicts and looks at in a few images (with an evaluator `maps`)
├── profile/             steps taken apart: split.json, split.png, trace.json (with profile.steps)
├── model.safetensors    the final weights
└── .lock                held by the process that writes the run
"""

import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from opsin.__version__ import __version__
from opsin.errors import RunError
from opsin.storage.files import remove_leftovers, write_atomic
from opsin.storage.lock import RunLock

_PACKAGES = ("torch", "torchvision", "torchcodec", "timm", "numpy", "pillow", "pydantic", "safetensors")
_UNWRITTEN = "choose another folder with --out, or make room for this one"


class RunDirectory:
    """The files of a run by name. Made by `prepare` it also holds the lock, until `close` or `with` ends."""

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
        self._lock = RunLock(path / ".lock")
        self._facts: dict[str, Any] = {}

    @classmethod
    def prepare(
        cls,
        path: Path,
        recipe_yaml: str,
        *,
        fresh: bool,
        differences: Callable[[str], Sequence[str]],
        notice: Callable[[str], None] = lambda text: None,
    ) -> Self:
        """The directory at `path`, locked, with this recipe: a new one, or that of a run to be continued.

        `differences` gets the text of the recipe that is there and gives one line for each difference
        that forbids to continue. `fresh` moves a run that is there to `DIR.before-1` (or the next free number),
        beside the folder that `path` links to where it is a link.

        Raises:
            RunError: unwritable; no run directory; in use; or a run of another recipe.
        """
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run._check_foreign()
            run._take_lock(notice)
            if fresh and run.exists():
                notice(f"{path}: the earlier run was moved to {run._move_aside()}")
                run._take_lock(notice)
            run._take_recipe(recipe_yaml, differences)
            for leftover in path.glob(".*.writing"):
                leftover.unlink(missing_ok=True)
        except BaseException as error:
            run.close()
            if isinstance(error, OSError):
                raise RunError(f"{path}: cannot be written: {_reason(error)}; {_UNWRITTEN}") from error
            raise
        return run

    @classmethod
    def locked(cls, path: Path, notice: Callable[[str], None] = lambda text: None) -> Self:
        """The directory of a run that was begun, locked; what a killed process left half done in it is finished.

        Raises:
            RunError: another process is writing it.
            OSError: the lock cannot be written.
        """
        run = cls(path)
        try:
            run._take_lock(notice)
        except BaseException:
            run.close()
            raise
        return run

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.recipe.exists() or self.run_json.exists()

    def recipe_name(self) -> str | None:
        """The name of the recipe that the run began with; None where no session was noted.

        Raises:
            RunError: `run.json` is damaged.
        """
        try:
            return str(json.loads(self.run_json.read_text())["recipe"]) if self.run_json.exists() else None
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error

    def check_held(self) -> None:
        """See that the lock that was taken is still this process's; cheap enough for every row.

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

    def begin_session(self, *, recipe: str, seed: int, hardware: Mapping[str, object]) -> None:
        """Note in `run.json` that this process trains the run; a resume adds a session to those before.

        `hardware` holds plain facts without the name of the machine.

        Raises:
            RunError: `run.json` is damaged or cannot be written.
        """
        sessions = self._earlier_sessions()
        now = {"status": "running", "started": _now(), "ended": None, "reason": None}
        about = {"versions": installed_versions(), "git": git_state(), "hardware": dict(hardware)}
        self._facts = {"recipe": recipe, "seed": seed, "sessions": [*sessions, {**now, **about}]}
        self._write_facts()

    def end_session(self, status: Literal["done", "stopped", "failed"], reason: str | None = None) -> None:
        """Note how the session that `begin_session` began has ended.

        Raises:
            RunError: `run.json` cannot be written.
            LockLost: it is another process's.
        """
        assert self._facts, "no session was begun"
        self.check_held()
        self._facts["sessions"][-1].update(status=status, ended=_now(), reason=reason)
        self._write_facts()

    def _take_lock(self, notice: Callable[[str], None]) -> None:
        """Take the lock, and finish what the process before was killed in: who looks now sees every checkpoint."""
        self._lock.take(notice)
        remove_leftovers(self.checkpoints)

    def _check_foreign(self) -> None:
        # Hidden names are ours (the lock, a file half written when the power went) or the system's.
        others = sorted(item.name for item in self.path.iterdir() if not item.name.startswith("."))
        if others and not self.exists():
            raise RunError(
                f"{self.path}: holds {len(others)} other files ({others[0]}, ...) and no run; "
                "choose an empty or a new folder with --out"
            )

    def _move_aside(self) -> Path:
        """Where the run is now; an empty folder has taken its place."""
        # A link stays, and goes on to lead to the disk that was chosen for the run.
        place = self.path.resolve() if self.path.is_symlink() else self.path
        number = 1
        while (target := place.with_name(f"{place.name}.before-{number}")).exists():
            number += 1
        place.rename(target)
        place.mkdir()
        return target

    def _take_recipe(self, recipe_yaml: str, differences: Callable[[str], Sequence[str]]) -> None:
        before = self.recipe.read_text() if self.recipe.exists() else recipe_yaml
        different = [] if before == recipe_yaml else differences(before)
        if different:
            raise RunError(
                f"{self.path}: holds a run of another recipe",
                *(f"{self.recipe}: {line}" for line in different),
                f"choose another --out, start over with --fresh (the earlier run is kept), "
                f"or go on with changed keys: opsin resume {self.path} key=value",
            )
        write_atomic(self.recipe, recipe_yaml.encode())

    def _earlier_sessions(self) -> list[dict[str, Any]]:
        if not self.run_json.exists():
            return []
        try:
            sessions: list[dict[str, Any]] = json.loads(self.run_json.read_text())["sessions"]
            for session in sessions:
                if session["status"] == "running":
                    session["status"] = "killed"
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        return sessions

    def _damaged(self, error: Exception) -> RunError:
        return RunError(f"{self.run_json}: is damaged ({error}); delete it to go on without its history")

    def _write_facts(self) -> None:
        sessions = self._facts["sessions"]
        facts = {**self._facts, **sessions[-1], "started": sessions[0]["started"], "sessions": sessions}
        try:
            write_atomic(self.run_json, (json.dumps(facts, indent=2) + "\n").encode())
        except OSError as error:
            raise RunError(f"{self.run_json}: cannot be written: {_reason(error)}; {_UNWRITTEN}") from error


def spelled_out(path: Path) -> Path:
    """`path`, in full where it ends in no name (`.`, `..`): such a path leads elsewhere once its folder has moved."""
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
    """Commit of the working directory, and whether tracked files differ from it; None outside git."""
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


def _reason(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
