"""The runs of a folder, with their state and best scores."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from opsin.storage.directory import RunDirectory
from opsin.storage.lock import is_held
from opsin.storage.table import aligned


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run in a list. `status` is that of `run.json`, or else `killed`, `new` or `damaged`."""

    name: str
    status: str
    recipe: str | None = None
    step: int | None = None
    best: Mapping[str, float] = field(default_factory=dict)
    started: str | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the fields as plain values."""
        return asdict(self)


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in `folder`, sorted by name; none where there is no such folder."""
    if not folder.is_dir():
        return []
    paths = [folder] if RunDirectory(folder).exists() else sorted(path for path in folder.iterdir() if path.is_dir())
    return [_summary_of(RunDirectory(path)) for path in paths if RunDirectory(path).exists()]


def runs_table(runs: Sequence[RunSummary]) -> list[str]:
    """The runs as lines of aligned columns, with a head; at most three scores each."""
    rows = [("run", "status", "recipe", "step", "best")]
    for run in runs:
        # Scores of an evaluation say more than those of the training batches.
        names = sorted(run.best, key=lambda name: (name.startswith(("train/", "loss/")), name))[:3]
        best = "  ".join(f"{name} {run.best[name]:.4g}" for name in names)
        rows.append((run.name, run.status, run.recipe or "-", "-" if run.step is None else str(run.step), best or "-"))
    return aligned(rows)


def _summary_of(run: RunDirectory) -> RunSummary:
    name = run.path.resolve().name
    try:
        facts = json.loads(run.run_json.read_text()) if run.run_json.exists() else {"status": "new"}
        scores = json.loads(run.summary.read_text())["scores"] if run.summary.exists() else {}
        status = facts["status"]
        if status == "running" and not is_held(run.path / ".lock"):
            status = "killed"
        best = {score: float(history["best"]) for score, history in scores.items() if "best" in history}
        return RunSummary(name, status, facts.get("recipe"), last_step(run.metrics), best, facts.get("started"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return RunSummary(name, "damaged")


def last_step(metrics: Path) -> int | None:
    """The step of the newest row in a `metrics.jsonl`, read from its end; None where there is none."""
    if not metrics.exists():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 65536))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut off by a crash
            continue
    return None
