"""What the loop costs: `opsin.fit` against a plain PyTorch loop that does the same work.

    PYTHONPATH=src python benchmarks/loop_overhead.py [--batch 32] [--rounds 11] [--steps 20]

Both train the same network on the same batches, with the same number format, attention, fused AdamW,
clip and cosine schedule, and read the loss every 50 steps. What opsin does besides is its overhead:
seeding the layers, the test for finite numbers, the journal, the look at clock and signals.

They take turns within one process: whenever `fit` asks for the first batch of a round, the plain
loop runs its own round first.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from torch import nn

from interleaved import Timing, table
from opsin.data.base import Batch, Data, DataFacts, Detour
from opsin.methods.base import Method
from opsin.methods.supervised import Supervised
from opsin.reporting.console import Console
from opsin.reporting.journal import Journal
from opsin.reporting.teller import RunTeller
from opsin.run.assemble import assemble
from opsin.run.parts import build_parts
from opsin.run.recipe import Recipe, read
from opsin.storage.directory import RunDirectory
from opsin.training.loop import Run, fit

NETWORK = ["model.width=192", "model.depth=6", "model.heads=3", "model.patch=1"]
QUIET = [
    "evaluators.val=null",
    "checkpoints.every=never",
    "data.workers=0",
    "log.tensorboard=false",
    "log.csv=false",
    "log.plots=false",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=20, help="steps in a round")
    arguments = parser.parse_args()

    steps = arguments.steps * (arguments.rounds + 1)
    keys = [f"batch_size={arguments.batch}", "epochs=1000", f"limits.steps={steps}", *NETWORK, *QUIET]
    recipe = read("quickstart", keys)
    with tempfile.TemporaryDirectory() as folder:
        own = prepare(recipe, Path(folder) / "own")
        other = prepare(recipe, Path(folder) / "plain")
        turns = Turns(own.data, arguments.steps, plain_loop(recipe, other, arguments.steps))
        fit(replace(own, data=turns))

    # The first round warms up caches and the allocator.
    plain, ours = Timing("plain loop", tuple(turns.plain_s[1:])), Timing("opsin.fit", tuple(turns.own_s[1:]))
    rows = [[t.name, f"{t.median_s / arguments.steps * 1e3:.2f}"] for t in (plain, ours)]
    print(f"{arguments.rounds} rounds of {arguments.steps} steps in turns, batch {arguments.batch}, digits in memory")
    print(table(["", "ms/step"], rows))
    print(f"overhead: {(1 / ours.speed_over(plain) - 1) * 100:+.1f} %")


def prepare(recipe: Recipe, folder: Path) -> Run:
    """A run of `recipe` as `opsin train` assembles it, without output."""
    folder.mkdir()
    console = Console(io.StringIO(), quiet=True)
    teller = RunTeller(Journal(folder, teller=console), console)
    return assemble(build_parts(recipe, teller), RunDirectory(folder), teller)


@dataclass
class Turns:
    """The batches of a run; before each round, the other loop has its turn."""

    data: Data
    steps: int
    other_round: Callable[[], None]
    own_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)
    facts: DataFacts = field(init=False)

    def __post_init__(self) -> None:
        self.facts = self.data.facts

    def batches(self, start: int, stop: int, detours: Sequence[Detour] = ()) -> Iterator[Batch]:
        """The batches of the data; the time between is measured round by round."""
        began = 0.0
        for number, batch in enumerate(self.data.batches(start, stop, detours)):
            if number % self.steps == 0:
                if number:
                    self.own_s.append(time.perf_counter() - began)
                before = time.perf_counter()
                self.other_round()
                began = time.perf_counter()
                self.plain_s.append(began - before)
            yield batch
        self.own_s.append(time.perf_counter() - began)


def plain_loop(recipe: Recipe, run: Run, steps: int) -> Callable[[], None]:
    """Rounds of a loop as one writes it by hand."""
    state = run.start.fresh()
    method = supervised(state.method)
    optim, total = recipe.optim, run.plan.clock(0).total_steps
    optimizer = torch.optim.AdamW(
        method.parameters(), lr=optim.peak_lr(recipe.batch_size), weight_decay=optim.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    smoothing = method.config.label_smoothing
    batches = run.data.batches(0, run.agenda.last_step)
    numbers = count(1)
    losses: list[float] = []

    def one_round() -> None:
        for number, _ in zip(numbers, range(steps), strict=False):
            batch = next(batches)
            with run.plan.autocast():
                logits = method.logits(batch.views["image"][0])
                loss = nn.functional.cross_entropy(logits.float(), batch.labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(method.parameters(), optim.clip_norm or float("inf"))
            optimizer.step()
            scheduler.step()
            if number % recipe.log.every == 0:
                losses.append(loss.item())

    return one_round


def supervised(method: Method) -> Supervised:
    """The method of the quickstart recipe."""
    assert isinstance(method, Supervised)
    return method


if __name__ == "__main__":
    main()
