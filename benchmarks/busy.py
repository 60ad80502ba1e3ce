"""Training beside other programs: how threads are chosen and wait, against each fixed setting, alone and busy.

    PYTHONPATH=src python benchmarks/busy.py [quickstart vit dino dino-digits] [--rounds 2] [--seconds 3]

Each setting trains in a process of its own; they take turns, each for some seconds, with nothing else and then with
an endless loop on every core but one. All four works take about seven minutes. The exit status is 1 if what opsin
chooses is slower than 0.95 of the best setting alone, or than 0.8 of it beside the loops.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from interleaved import table

_VIT_TI = ("model.width=192", "model.depth=12", "model.heads=3", "model.patch=16")
WORKS = {
    "quickstart": ("quickstart",),
    "vit": ("quickstart", *_VIT_TI, "model.mlp_ratio=4", "model.dropout=0", "data.image_size=224", "batch_size=16"),
    "dino": ("dino-imagenet-vits16", *_VIT_TI, "batch_size=4", "evaluators={}"),
    "dino-digits": ("dino-digits",),
}
SETTINGS = {
    "as chosen": {},
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "sleeping": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
_OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
LEAST = {"alone": 0.95, "busy": 0.8}


def serve(work: str) -> None:
    """Train on fixed batches: for each line `WARM SECONDS` that is read, print the images per second."""
    from itertools import cycle, islice

    from opsin.reporting.console import Console
    from opsin.run.assemble import temporary_run
    from opsin.run.recipe import read
    from opsin.training.step import train_step

    name, *keys = WORKS[work]
    common = ("data.path=digits", "data.workers=0", "device=cpu")
    recipe = read(name, [*keys, *common])
    with temporary_run(recipe, Console(io.StringIO(), quiet=True)) as run:
        state = run.start.fresh()
        batches = cycle(list(islice(run.data.batches(0, run.agenda.last_step), 4)))

        def images(seconds: float) -> float:
            begun, count = time.perf_counter(), 0
            while not count or time.perf_counter() - begun < seconds:
                report = train_step(state, next(batches), run.plan)
                count += report.images
            return count / (time.perf_counter() - begun)

        images(0)
        print("ready", flush=True)
        for line in sys.stdin:
            warm, seconds = map(float, line.split())
            images(warm)
            print(images(seconds), flush=True)


@contextmanager
def loops(count: int) -> Iterator[None]:
    """Endless loops beside what is inside."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def servers(work: str) -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """A process that trains for each setting, ready."""
    plain = {name: value for name, value in os.environ.items() if name not in _OURS}
    command = [sys.executable, __file__, "--serve", work]
    begun = {
        name: subprocess.Popen(command, env={**plain, **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, own in SETTINGS.items()
    }
    try:
        for name, process in begun.items():
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"{work}, {name}: did not begin (see above)")
        yield begun
    finally:
        for process in begun.values():
            process.kill()
            process.wait()


def ask(process: "subprocess.Popen[str]", warm: float, seconds: float) -> float:
    """Images per second of one turn."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{warm} {seconds}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def measure(work: str, rounds: int, seconds: float) -> bool:
    """Print the table of a work; True if what is chosen is fast enough."""
    rates: dict[tuple[str, str], list[float]] = {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with servers(work) as processes:
        for _ in range(rounds):
            for condition, count in (("alone", 0), ("busy", cores - 1)):
                with loops(count):
                    for name, process in processes.items():
                        # What opsin chooses follows the load within some seconds.
                        warm = 5.0 if name == "as chosen" else 0.5
                        rates.setdefault((name, condition), []).append(ask(process, warm, seconds))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    best = {condition: max(rate for (_, one), rate in medians.items() if one == condition) for condition in LEAST}
    shares = {key: rate / best[key[1]] for key, rate in medians.items()}
    rows = [
        [name, *(text for one in LEAST for text in (f"{medians[name, one]:,.1f}", f"{shares[name, one]:.2f}"))]
        for name in SETTINGS
    ]
    print(f"\n{work}: images/s and share of the best, {cores} cores, {rounds} rounds, busy: {cores - 1} endless loops")
    print(table(["", "alone", "of best", "busy", "of best"], rows), flush=True)
    return all(shares["as chosen", condition] >= least for condition, least in LEAST.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("works", nargs="*", metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--serve", metavar="WORK", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    works = arguments.works or list(WORKS)
    if unknown := set(works) - set(WORKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(WORKS)}")
    slow = [work for work in works if not measure(work, arguments.rounds, arguments.seconds)]
    wanted = f"{LEAST['alone']} of the best alone and {LEAST['busy']} busy"
    print(f"\nslower than {wanted}: {', '.join(slow)}" if slow else f"\nall reach {wanted}")
    sys.exit(bool(slow))


if __name__ == "__main__":
    main()
