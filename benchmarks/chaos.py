"""Chaos: whether trainings through random faults end in the bytes of an undisturbed one, and lose nothing.

    PYTHONPATH=src:. python benchmarks/chaos.py [--runs 200] [--seed 0] [--jobs 2] [--only FAULT]

A vision transformer on the bundled digits, with dropout and accumulation, for 40 steps with a checkpoint every 5. Each
run has one fault of chaos_faults.py, and everything random about it comes from its seed: `--only FAULT --seed N` does
run N again, as far as a machine does anything again at the same moment. Once the fault is gone a run that ended early
goes on with the same command. It is the same if its final weights and the losses of all steps are those of the
undisturbed run; refused if it ended by itself with a message (exit status 2 or 4, no traceback) and was the same
afterwards; lost otherwise. `full_disk` needs the right to mount, `s3_gone` needs moto.
"""

import argparse
import gc
import multiprocessing
import os
import random
import shlex
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from chaos_faults import FAULTS
from chaos_runs import STEPS, Case, said
from interleaved import table
from opsin.reporting import read_rows
from opsin.rundir import RunDirectory
from opsin.verify import digest

Verdict = Literal["same", "refused", "lost"]


@dataclass(frozen=True, slots=True)
class Learned:
    """What a run has come to."""

    weights: str
    losses: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, run: RunDirectory) -> "Learned":
        losses = [(row.step, row.values["train/loss"]) for row in read_rows(run.metrics) if "train/loss" in row.values]
        return cls(digest(run), tuple(losses))

    def difference(self, wanted: "Learned") -> str:
        """In words; nothing where there is none."""
        if self.weights != wanted.weights:
            return f"other weights ({self.weights[:16]})"
        if self.losses != wanted.losses:
            missing = sorted(set(wanted.losses) - set(self.losses))
            return f"other losses; of steps {[step for step, _ in missing]} they are missing or others"
        return ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a disturbed run."""

    fault: str
    seed: int
    verdict: Verdict
    story: str
    said: str
    """The message of a refusal, or what is wrong with a run that was lost."""

    @property
    def command(self) -> str:
        """What does it again."""
        return shlex.join(["python", "benchmarks/chaos.py", "--only", self.fault, "--seed", str(self.seed)])


def plan(runs: int, seed: int, only: str | None) -> Iterator[tuple[str, int]]:
    """The fault and the seed of each run: all faults about equally often, in random order."""
    draw, deck = random.Random(seed), list[str]()
    for number in range(runs):
        deck = deck or draw.sample(sorted(FAULTS), len(FAULTS))
        yield only or deck.pop(), seed + number


def carry_out(fault: str, seed: int, *, wanted: Learned, folder: Path) -> Outcome:
    place = folder / f"{fault}-{seed}"
    place.mkdir()
    case = Case(place, random.Random(f"{fault} {seed}"))
    outcome = partial(Outcome, fault, seed)
    with case.cleanup:
        try:
            status = FAULTS[fault](case)
            refusal = _refusal(case, status)
            wrong = _finish(case) if status else ""
            wrong = wrong or Learned.of(case.run).difference(wanted)
            wrong = wrong or next(filter(None, (proof() for proof in case.proofs)), "")
        except Exception as error:  # also what ended a run before a fault could come
            return outcome("lost", "; ".join(case.story), f"{error!r}\n{said(case)}")
    story = "; ".join(case.story)
    # A bare error of the system is no message: nobody can act on it.
    if wrong or "Traceback" in refusal or "opsin: [Errno" in refusal:
        return outcome("lost", story, "\n".join(filter(None, [wrong, refusal])))
    return outcome("refused" if refusal else "same", story, refusal)


def _refusal(case: Case, status: int) -> str:
    """What a run said that ended by itself, other than by a signal or a stop; nothing for others."""
    if status <= 0 or status == 3:
        return ""
    text = said(case)
    return text if "opsin: " in text else f"exit status {status} without a word: Traceback?\n{text}"


def _finish(case: Case) -> str:
    """Go on now that the fault is gone; what is wrong with that."""
    status = case.start().wait()
    return f"exit status {status} with the fault gone: {said(case)}" if status else ""


def undisturbed(folder: Path) -> Learned:
    case = Case(folder, random.Random(0))
    status = case.start().wait()
    assert status == 0, said(case)
    learned = Learned.of(case.run)
    assert [step for step, _ in learned.losses] == [*range(1, STEPS + 1)], "each step has its row"
    return learned


def import_everything() -> None:
    """What a training imports late: forked processes share it."""
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401

    import opsin.session  # noqa: F401

    gc.freeze()


def report(outcomes: list[Outcome]) -> bool:
    """Print the table, the refusals and what was lost; whether nothing was."""
    verdicts: tuple[Verdict, ...] = ("same", "refused", "lost")
    rows = []
    for fault in (*FAULTS, "all"):
        own = [outcome.verdict for outcome in outcomes if fault in (outcome.fault, "all")]
        if own:
            rows.append([fault, str(len(own)), *(str(own.count(verdict)) for verdict in verdicts)])
    print(table(["fault", "runs", "same bytes", "refused, then same bytes", "lost"], rows))
    refusals = sorted({f"{o.fault}: {o.said.strip().splitlines()[-1]}" for o in outcomes if o.verdict == "refused"})
    print("\nrefused with, among others:", *refusals[:20], sep="\n  ")
    lost = [outcome for outcome in outcomes if outcome.verdict == "lost"]
    for outcome in lost:
        print(f"\nLOST: {outcome.command}\n  {outcome.story}\n  {outcome.said}")
    print(f"\n{'NOT ' if lost else ''}nothing is lost" if lost else "\nnothing is lost")
    return not lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, help="how many (default: 200, or 1 with --only)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", choices=sorted(FAULTS), metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for all that the runs leave")
    arguments = parser.parse_args()
    runs = arguments.runs or (1 if arguments.only else 200)

    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    import_everything()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="opsin-chaos-", ignore_cleanup_errors=True) as name:
        folder = arguments.keep or Path(name)
        (folder / "undisturbed").mkdir(parents=True)
        wanted = undisturbed(folder / "undisturbed")
        # Forked before any thread begins; each forks its trainings itself.
        with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
            work = partial(carry_out, wanted=wanted, folder=folder)
            for future in as_completed(
                [pool.submit(work, *case) for case in plan(runs, arguments.seed, arguments.only)]
            ):
                outcome = future.result()
                outcomes.append(outcome)
                told = f"{outcome.fault} {outcome.seed} {outcome.verdict}: {outcome.story}"
                print(f"{len(outcomes)} of {runs}: {told}", file=sys.stderr, flush=True)
    return 0 if report(outcomes) else 1


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    os._exit(ended)  # without a word about what was never collected
