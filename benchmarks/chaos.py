"""Chaos: whether trainings through random faults end in the bytes of an undisturbed one, and lose nothing.

    PYTHONPATH=src:. python benchmarks/chaos.py [--runs 200] [--seed 0] [--jobs 2] [--only FAULT]

A vision transformer on the bundled digits, with dropout and accumulation, for 40 steps with a checkpoint every 5. Each
run has one fault of chaos_faults.py, and everything random about it comes from its seed: `--only FAULT --seed N` does
run N again, as far as a machine does anything again at the same moment. Once the fault is gone a run that ended early
goes on with the same command. It is the same if its final weights and the losses of all steps are those of the
undisturbed run; refused if it ended by itself with a message (exit status 2 or 4, no traceback) and was the same
afterwards; lost otherwise. A run that has not felt its fault proves nothing: it is counted apart, and another seed
takes its place. `full_disk` needs the right to mount, `s3_gone` needs moto.
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

from chaos_conditions import writes_are_counted
from chaos_faults import FAULTS
from chaos_runs import STEPS, Case, Learned, Undisturbed, said
from interleaved import table

Verdict = Literal["same", "refused", "lost", "unstruck"]
_ATTEMPTS = 5


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


def carry_out(fault: str, seed: int, *, stride: int, undisturbed: Undisturbed, folder: Path) -> list[Outcome]:
    """A run that has felt its fault, after those that have not: each with a seed that is `stride` higher."""
    outcomes: list[Outcome] = []
    while len(outcomes) < _ATTEMPTS and all(outcome.verdict == "unstruck" for outcome in outcomes):
        outcomes.append(disturbed(fault, seed + len(outcomes) * stride, undisturbed, folder))
    return outcomes


def disturbed(fault: str, seed: int, undisturbed: Undisturbed, folder: Path) -> Outcome:
    place = folder / f"{fault}-{seed}"
    place.mkdir()
    case = Case(place, random.Random(f"{fault} {seed}"), undisturbed)
    outcome = partial(Outcome, fault, seed)
    with case.cleanup:
        try:
            status = FAULTS[fault](case)
            refusal = _refusal(case, status)
            wrong = _finish(case) if status else ""
            wrong = wrong or Learned.of(case.run).difference(case.wanted)
            wrong = wrong or next(filter(None, (proof() for proof in case.proofs)), "")
        except Exception as error:  # also what ended a run before a fault could come
            return outcome("lost", "; ".join(case.story), f"{error!r}\n{said(case)}")
    story = "; ".join(case.story)
    # A bare error of the system is no message: nobody can act on it.
    if wrong or "Traceback" in refusal or "opsin: [Errno" in refusal:
        return outcome("lost", story, "\n".join(filter(None, [wrong, refusal])))
    if refusal:
        return outcome("refused", story, refusal)
    return outcome("same" if case.has_struck else "unstruck", story, "")


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


def left_alone(folder: Path) -> Undisturbed:
    case = Case(folder, random.Random(0), Undisturbed(Learned("", ()), 0, 0))
    tally = folder / "tally"
    status = case.start(writes_are_counted(case.run.path, tally)).wait()
    assert status == 0, said(case)
    learned = Learned.of(case.run)
    assert [step for step, _ in learned.losses] == [*range(1, STEPS + 1)], "each step has its row"
    sizes = [path.stat().st_size for path in case.run.path.rglob("*") if path.is_file()]
    return Undisturbed(learned, writes=tally.stat().st_size, largest_bytes=max(sizes))


def import_everything() -> None:
    """What a training imports late: forked processes share it."""
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401

    import opsin.run.session  # noqa: F401
    import tests.chaos.poisoned  # noqa: F401  # makes its method known

    gc.freeze()


def report(outcomes: list[Outcome], runs: int) -> bool:
    """Print the table, the refusals and what was lost; whether nothing was, and `runs` faults have struck."""
    verdicts: tuple[Verdict, ...] = ("same", "refused", "lost", "unstruck")
    rows = []
    for fault in (*FAULTS, "all"):
        own = [outcome.verdict for outcome in outcomes if fault in (outcome.fault, "all")]
        if own:
            counts = [own.count(verdict) for verdict in verdicts]
            rows.append([fault, *map(str, [sum(counts[:-1]), *counts])])
    print(table(["fault", "struck", "same bytes", "refused, then same bytes", "lost", "did not strike"], rows))
    refused = [(outcome.fault, outcome.said.splitlines()) for outcome in outcomes if outcome.verdict == "refused"]
    refusals = sorted({f"{fault}: {line}" for fault, lines in refused for line in lines if line.startswith("opsin: ")})
    if refusals:
        print("\nrefused with, among others:", *refusals[:20], sep="\n  ")
    lost = [outcome for outcome in outcomes if outcome.verdict == "lost"]
    for outcome in lost:
        print(f"\nLOST: {outcome.command}\n  {outcome.story}\n  {outcome.said}")
    struck = sum(outcome.verdict != "unstruck" for outcome in outcomes)
    print(f"\nlost: {len(lost)} of {struck} disturbed runs")
    if struck < runs:
        print(f"{runs - struck} of {runs} faults did not strike with any of {_ATTEMPTS} seeds")
    return not lost and struck == runs


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
        undisturbed = left_alone(folder / "undisturbed")
        # Forked before any thread begins; each forks its trainings itself.
        with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
            work = partial(carry_out, stride=runs, undisturbed=undisturbed, folder=folder)
            futures = [pool.submit(work, *case) for case in plan(runs, arguments.seed, arguments.only)]
            for number, future in enumerate(as_completed(futures), 1):
                for outcome in future.result():
                    outcomes.append(outcome)
                    told = f"{outcome.fault} {outcome.seed} {outcome.verdict}: {outcome.story}"
                    print(f"{number} of {runs}: {told}", file=sys.stderr, flush=True)
    return 0 if report(outcomes, runs) else 1


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    os._exit(ended)  # without a word about what was never collected
