"""Alarms: whether injected troubles are found, soon, by the right name and with the right consequence; and whether
healthy runs give none.

    PYTHONPATH=src python benchmarks/guard_alarms.py [--seeds 5] [--healthy 50] [--steps 400]

Small trainings on the bundled digits, on the CPU. Troubles are injected from a step on: a method multiplies its loss,
narrows its features, keeps memory or sleeps, or its images come late. Healthy runs take turns between supervised
training, DINO and H-JEPA, each with another seed and all monitors as they are by default. What monitors say of the
machine in healthy runs (speed, waiting, memory) is counted apart: it is real where others use the machine.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from interleaved import table
from opsin.data.base import DataFacts
from opsin.errors import OpsinError
from opsin.methods.base import Batch, Clock, Losses, MethodConfig, Views
from opsin.methods.supervised import Supervised, SupervisedConfig
from opsin.nn.backbone import ModelConfig
from opsin.reporting.journal import Event, read_events
from opsin.run.recipe import read
from opsin.run.session import train_recipe
from opsin.storage.directory import RunDirectory

Trouble = Literal["nan", "loss", "gradient", "collapse", "slow", "starved", "memory"]

FROM = 250
"""The step from which on something is wrong."""
SMALL = (
    "device=cpu",
    "precision=fp32",
    "data.workers=0",
    "log.every=10",
    "log.tensorboard=false",
    "log.csv=false",
    "log.plots=false",
    "checkpoints.every=50 steps",
    "checkpoints.best=null",
)
SUPERVISED = ("epochs=60", "batch_size=128", "model.width=32", "model.depth=1", "model.heads=2", "evaluators.val=null")
HEALTHY: Mapping[str, tuple[str, ...]] = {
    "quickstart": SUPERVISED,
    "dino-digits": ("evaluators.knn=null", "evaluators.linear=null"),
    "hjepa-digits": ("evaluators.knn=null", "evaluators.linear=null"),
}
OF_THE_MACHINE = ("throughput", "starvation", "memory")


class SickConfig(MethodConfig):
    """Supervised training in which something goes wrong at a step."""

    name: Literal["sick"] = "sick"
    trouble: Trouble = "nan"
    """What."""

    def build(self, model: ModelConfig, facts: DataFacts) -> "Sick":
        return Sick(self, model, facts)


class Sick(Supervised):
    """Shows its features to monitors, and does what `trouble` says."""

    def __init__(self, config: SickConfig, model: ModelConfig, facts: DataFacts) -> None:
        super().__init__(SupervisedConfig(), model, facts)
        self.trouble = config.trouble
        self.is_sick = False
        self.kept: list[Tensor] = []
        self.called_at: list[float] = []

    def pause(self) -> None:
        """Three times as long as a step takes usually, whatever else the machine does."""
        steps = [after - before for before, after in pairwise(self.called_at[FROM - 50 : FROM])]
        time.sleep(3 * statistics.median(steps))

    def views(self, image_size: int) -> Views:
        views = super().views(image_size)
        return replace(views, augment={"image": [*views.augment["image"], Late(self)]})

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        self.is_sick = clock.step >= FROM
        self.called_at.append(time.perf_counter())
        losses = super().forward(batch, clock)
        with torch.no_grad():
            features = self.encode(batch.views["image"][0]).pooled.float()
        total = losses.total
        if self.is_sick and self.trouble == "nan":
            total = total * torch.nan
        elif self.is_sick and self.trouble == "loss":
            total = total + 3
        elif self.is_sick and self.trouble == "gradient":
            total = 1000 * total - 999 * total.detach()
        elif self.is_sick and self.trouble == "collapse":
            features = features.mean(0) + 0.01 * features
        elif self.is_sick and self.trouble == "slow":
            self.pause()
        elif self.is_sick and self.trouble == "memory":
            self.kept.append(torch.ones(1 << 18))  # 1 MiB
        return Losses(total, measures=losses.measures, features={"student": features})


class Late:
    """Images that are as they were, some time later."""

    num_draws = 1

    def __init__(self, method: Sick) -> None:
        self._method = method

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        if self._method.is_sick and self._method.trouble == "starved":
            self._method.pause()
        return images


@dataclass(frozen=True, slots=True)
class Case:
    """A trouble, and what is to be made of it."""

    trouble: Trouble
    key: str
    """Of the recipe, for what follows."""
    action: Literal["stop", "rollback"]
    finding: str
    within: int
    """Steps in which it must be found."""
    overrides: tuple[str, ...] = ()

    def run(self, seed: int, steps: int) -> tuple[int | None, str, str]:
        """The step at which something was found, what, and what followed."""
        own = (
            "method.name=sick",
            f"method.trouble={self.trouble}",
            f"{self.key}={self.action}",
            "guard.max_rollbacks=1",
        )
        others = (f"seed={seed}", f"limits.steps={steps}", *self.overrides)
        events, reason = train("quickstart", (*SMALL, *SUPERVISED, *own, *others))
        back = [event for event in events if event.kind == "rollback"]
        if back:
            return int(str(back[0].facts["last"])), str(back[0].facts["finding"]), "rollback"
        alerts = [event for event in events if event.kind == "alert"]
        stops = [event for event in alerts if str(event.facts["message"]) in reason]
        first = (stops or alerts)[0] if alerts else None
        if first is None:
            return None, "nothing", "none"
        return first.step, str(first.facts["finding"]), "stop" if stops else "warn"


CASES = (
    Case("nan", "guard.cancelled", "rollback", "cancelled", 20),
    Case("loss", "monitors.loss.action", "rollback", "loss_spike", 20),
    Case("gradient", "monitors.gradients.action", "rollback", "gradient_explosion", 10),
    Case(
        "collapse",
        "monitors.collapse.action",
        "rollback",
        "feature_collapse",
        100,
        ("monitors.collapse.every=10 steps",),
    ),
    Case("slow", "monitors.throughput.action", "stop", "slow", 60),
    Case("starved", "monitors.starvation.action", "stop", "starved", 100, ("monitors.starvation.seconds=1",)),
    Case(
        "memory",
        "monitors.memory.action",
        "stop",
        "memory_creep",
        200,
        ("monitors.memory.every=10 steps", "monitors.memory.growth=0.02", "monitors.memory.growth_gib=0.05"),
    ),
)


def train(recipe: str, overrides: tuple[str, ...]) -> tuple[list[Event], str]:
    """What a run told of itself, and why it ended early if it did; in a process of its own, with memory of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_train, recipe, overrides).result()


def _train(recipe: str, overrides: tuple[str, ...]) -> tuple[list[Event], str]:
    with tempfile.TemporaryDirectory() as folder:
        directory, reason = RunDirectory(Path(folder) / "run"), ""
        try:
            train_recipe(read(recipe, overrides), directory.path, name=recipe, quiet=True)
        except OpsinError as error:
            reason = str(error)
        return list(read_events(directory.events)), reason


def troubles(seeds: int, steps: int, only: str | None) -> Iterator[list[str]]:
    """A row for each trouble."""
    for case in (case for case in CASES if only in (None, case.trouble)):
        results = [case.run(seed, max(steps, FROM + case.within + 30)) for seed in range(seeds)]
        delays = [step - FROM for step, _, _ in results if step is not None]
        right = sum(
            step is not None and 0 < step - FROM <= case.within and (name, then) == (case.finding, case.action)
            for step, name, then in results
        )
        yield [
            case.trouble,
            f"{case.finding}, {case.action}",
            f"{case.within}",
            f"{min(delays)} to {max(delays)}" if delays else "never",
            f"{right} of {seeds}",
        ]
        print(case.trouble, results, flush=True)


def healthy(runs: int, steps: int) -> list[list[str]]:
    """A row for each recipe."""
    count: Counter[str] = Counter()
    false: Counter[str] = Counter()
    machine: Counter[str] = Counter()
    names = [*HEALTHY]
    for seed in range(runs):
        name = names[seed % len(names)]
        events, reason = train(name, (*SMALL, *HEALTHY[name], f"seed={seed}", f"limits.steps={steps}"))
        assert not reason, reason
        alerts = [event for event in events if event.kind == "alert"]
        count[name] += 1
        machine[name] += sum(event.facts["monitor"] in OF_THE_MACHINE for event in alerts)
        false[name] += sum(event.facts["monitor"] not in OF_THE_MACHINE for event in alerts)
        print(name, seed, [event.facts["message"] for event in alerts], flush=True)
    return [[name, str(count[name]), str(false[name]), str(machine[name])] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each trouble")
    parser.add_argument("--healthy", type=int, default=50, help="healthy runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", choices=[case.trouble for case in CASES], help="one trouble")
    arguments = parser.parse_args()
    found = [*troubles(arguments.seeds, arguments.steps, arguments.only)] if arguments.seeds else []
    quiet = healthy(arguments.healthy, arguments.steps) if arguments.healthy else []
    print(table(["trouble", "expected", "within steps", "found after steps", "right"], found))
    print(table(["healthy runs of", "runs", "false alarms", "alarms about the machine"], quiet))


if __name__ == "__main__":
    main()
