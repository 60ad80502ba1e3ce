"""Whether killed runs end in the bytes of a straight one: 20 runs, each killed one to three times at random.

    PYTHONPATH=src python benchmarks/exactness.py [--runs 20] [--steps 60] [--jobs 2] [--seed 0]

A vision transformer on the bundled digits with dropout, drop path and accumulation. Half of the runs
compute in fp32 and half in bf16; they load with 0, 1 and 3 workers in turn. SIGKILL falls between
two steps or into one; every second kill of a run waits for a checkpoint write. The straight runs load
in their own process; beside them one each trains without evaluators, logs and checkpoints on the way.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from interleaved import table
from opsin.commands.verify import Kill, Training, digest, finish, train_killed
from opsin.run.recipe import read
from opsin.settings.text import to_yaml
from opsin.storage.directory import RunDirectory

SETTINGS = (
    "batch_size=64",
    "epochs=4",
    "accumulate=2",
    "model.width=32",
    "model.depth=2",
    "model.dropout=0.1",
    "model.drop_path=0.2",
    "data.resident=false",
    "checkpoints.every=7 steps",
    "evaluators.val.every=1 epoch",
    "log.every=1",
    "log.tensorboard=false",
    "log.plots=false",
)
BLIND = ("evaluators.val=null", "log.every=1000000", "log.csv=false", "checkpoints.every=never")


@dataclass(frozen=True, slots=True)
class Trial:
    """A run and how often it is killed; without kills it is a reference."""

    name: str
    precision: str
    workers: int = 0
    kills: int = 0
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trial."""

    trial: Trial
    kills: tuple[Kill, ...]
    digest: str


def trials(runs: int, draw: random.Random) -> Iterator[Trial]:
    for precision in ("fp32", "bf16"):
        yield Trial("straight", precision)
        yield Trial("nothing looked at", precision, overrides=BLIND)
    for number in range(runs):
        precision, workers = ("fp32", "bf16")[number % 2], (0, 1, 3)[number % 3]
        yield Trial(f"killed {number + 1}", precision, workers, draw.randint(1, 3))


def carry_out(trial: Trial, *, folder: Path, steps: int, seed: int) -> Outcome:
    out = RunDirectory(folder / f"{trial.name} {trial.precision}".replace(" ", "-"))
    own = (f"precision={trial.precision}", f"data.workers={trial.workers}", *trial.overrides)
    messages = out.path.with_suffix(".messages")
    program = Training(folder / "recipe.yaml", out.path, own, messages)
    try:
        draw = random.Random(f"{seed} {trial.name}")
        kills = tuple(train_killed(program, out, steps, trial.kills, draw)) if trial.kills else ()
        if not trial.kills:
            finish(program.start(), trial.name)
    except Exception:
        sys.stderr.write(messages.read_text())
        raise
    return Outcome(trial, kills, digest(out))


def row(outcome: Outcome, wanted: str) -> list[str]:
    trial = outcome.trial
    kills = ", ".join(f"{kill.step}{'w' if kill.in_write else ''}" for kill in outcome.kills)
    resumed = ", ".join(str(kill.newest or 0) for kill in outcome.kills)
    verdict = "equal" if outcome.digest == wanted else "DIFFERENT"
    return [trial.name, trial.precision, str(trial.workers), kills, resumed, outcome.digest[:16], verdict]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # Everyone computes with one thread: with another number sums are rounded in another order.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    wanted = list(trials(arguments.runs, random.Random(arguments.seed)))
    outcomes: dict[Trial, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="opsin-exact-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        recipe = read("quickstart", [*SETTINGS, f"limits.steps={arguments.steps}"])
        (folder / "recipe.yaml").write_text(to_yaml(recipe, comments=False))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            work = partial(carry_out, folder=folder, steps=arguments.steps, seed=arguments.seed)
            for future in as_completed([pool.submit(work, trial) for trial in wanted]):
                outcome = future.result()
                outcomes[outcome.trial] = outcome
                print(f"{len(outcomes)} of {len(wanted)}: {outcome.trial.name}", file=sys.stderr, flush=True)

    straight = {trial.precision: outcomes[trial].digest for trial in wanted if trial.name == "straight"}
    rows = [row(outcomes[trial], straight[trial.precision]) for trial in wanted]
    print(table(["run", "format", "workers", "killed after step", "resumed from", "sha256", ""], rows))
    kills = [kill for outcome in outcomes.values() for kill in outcome.kills]
    writes = sum(kill.in_write for kill in kills)
    equal = sum(cells[-1] == "equal" for cells in rows)
    asked = sum(trial.kills for trial in wanted)
    print(f"{len(kills)} of {asked} kills, {writes} in the middle of a checkpoint write (w)")
    print(
        f"{'exact' if equal == len(rows) else 'NOT EXACT'}: {equal} of {len(rows)} runs end in the straight run's bytes"
    )
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
