"""Are the settings that `opsin tune` finds the best ones? Measured again, against each other, in turns.

    python benchmarks/tuning.py batch quickstart cifar10-cpu dino-digits
    python benchmarks/tuning.py all quickstart cifar10-cpu dino-digits --minutes 10
    python benchmarks/tuning.py all quickstart --busy 1

`batch` compares the choice of `opsin tune batch` with an exhaustive sweep: all numbers of parts up to 16, and powers of
two beyond. `all` compares `tuned.yaml` of `opsin tune all` with the recipe as shipped. With `--busy N`, N endless loops
take cores meanwhile. Keys of a recipe (`data.path=...`) are given as with opsin.
"""

import argparse
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opsin.reporting.teller import CommandTeller
from opsin.run.forecast import heaviest
from opsin.run.parts import Parts
from opsin.run.recipe import read
from opsin.storage.table import aligned
from opsin.tuning.all import plan_full_tuning
from opsin.tuning.batch import plan_tuning
from opsin.tuning.turns import Bench, Timing, Variant

WITHIN = 0.05
_MEMORY = 0.8
_SECONDS = 150.0


def spin() -> None:
    """Use a core, for ever."""
    while True:
        pass


@contextmanager
def endless_loops(number: int) -> Iterator[None]:
    """Processes that use as many cores while the block lasts."""
    loops = [multiprocessing.Process(target=spin, daemon=True) for _ in range(number)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()


def compare(parts: Parts, variants: Sequence[Variant], seconds: float) -> list[Timing]:
    """Measure variants of a recipe in turns, for about `seconds`."""
    timings = [Timing(variant) for variant in variants]
    with Bench(parts.timeline.stages.index(heaviest(parts)), _MEMORY, CommandTeller()) as bench:
        bench.compare(timings, seconds)
    rows = [
        (one.variant.name, f"{one.rate:,.0f}", f"{one.spread:.1%}", f"{one.peak_bytes / 2**30:.2f} GiB", one.fault)
        for one in timings
    ]
    print("\n".join(aligned([("", "images/s", "spread", "memory", ""), *rows], 1)), flush=True)
    return timings


def check_batch(name: str, keys: Sequence[str], minutes: float) -> str:
    """Compare the choice with all others."""
    tuning, parts = plan_tuning(name, keys, rule="keep", inexact=True)
    tuning.measure(parts, fraction=_MEMORY, seconds=60 * minutes, teller=CommandTeller())
    print("\n".join(tuning.lines()), flush=True)
    chosen = (tuning.best or tuning.current).variant.recipe.accumulate
    smallest = min(stage.batch_size for stage in parts.timeline.stages)
    numbers = [*range(1, 17), *(2**power for power in range(5, 12)), chosen]
    variants = []
    for number in sorted(set(numbers)):
        if number <= smallest:
            recipe = read(name, [*keys, f"accumulate={number}"])
            variants.append(Variant({"accumulate": number}, recipe, f"accumulate={number}"))
    timings = compare(parts, variants, 4 * _SECONDS)
    best = max(timings, key=lambda one: one.rate)
    mine = next(one for one in timings if one.variant.found["accumulate"] == chosen)
    share = mine.rate / best.rate
    verdict = "ok" if share >= 1 - WITHIN else "BEHIND"
    return f"{name}: {verdict}: chose {mine.variant.name}, {share:.3f} of the best ({best.variant.name})"


def check_all(name: str, keys: Sequence[str], minutes: float, *, inexact: bool) -> str:
    """Compare what was found with the recipe, once more and apart from the measurements that found it."""
    tuning, parts = plan_full_tuning(name, keys, inexact=inexact)
    tuning.measure(parts, fraction=_MEMORY, seconds=60 * minutes, teller=CommandTeller())
    print("\n".join(tuning.lines()), flush=True)
    if not tuning.gained:
        return f"{name}: ok: says that nothing was gained"
    variants = [tuning.variant({}, "the recipe"), tuning.variant(tuning.gained, "tuned")]
    before, after = compare(parts, variants, _SECONDS)
    gain = after.gain_over(before)
    return f"{name}: {'ok' if gain > 0 else 'BEHIND'}: {1 + gain:.2f} times the recipe, measured again"


def main() -> None:
    """Check the recipes one after another; the verdicts are the last lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("batch", "all"))
    parser.add_argument("recipes", nargs="+", help="recipes, and keys for all of them")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--inexact", action="store_true")
    parser.add_argument("--busy", type=int, default=0, metavar="N")
    asked = parser.parse_args()
    keys = [text for text in asked.recipes if "=" in text]
    verdicts = []
    with endless_loops(asked.busy):
        for name in asked.recipes:
            if name in keys:
                continue
            print(f"== {name}", flush=True)
            if asked.subject == "batch":
                verdicts.append(check_batch(name, keys, asked.minutes))
            else:
                verdicts.append(check_all(name, keys, asked.minutes, inexact=asked.inexact))
    print("\n".join(verdicts))


if __name__ == "__main__":
    main()
