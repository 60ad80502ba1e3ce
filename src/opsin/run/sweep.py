"""A sweep of the learning rate: train a moment with a rising rate, and read a good one from the losses.

Nothing of a run is touched: the sweep has weights of its own and writes into its own folder only.

FOLDER/
├── lr.csv        step, lr, loss, smoothed
├── lr.png        the curve, with what was read from it
├── lr.json       the numbers and the verdict
└── tuned.yaml    the recipe with the learning rate; missing if the curve has no usable slope
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch.optim import Optimizer

from opsin.clock.schedule import Constant
from opsin.clock.timeline import Clock
from opsin.errors import ConfigError, TrainingError
from opsin.reporting.console import Console
from opsin.run.assemble import temporary_run
from opsin.run.lr_curve import FEWEST_STEPS, Divergence, Reading, draw_curve, read_curve, sweep_rates
from opsin.run.recipe import Recipe, read
from opsin.run.tuned import TUNED, WAY_OUT, clear_results, tuned_recipe
from opsin.settings.text import flatten
from opsin.storage.files import write_atomic, writing
from opsin.training.loop import Run
from opsin.training.optim import AdamW
from opsin.training.stages import StageConfig
from opsin.training.state import ScheduledValues
from opsin.training.step import train_step

STEPS = 200
CURVE, PICTURE, RESULT = "lr.csv", "lr.png", "lr.json"

_ADAPTIVE_RANGE = (1e-5, 1.0)
_PLAIN_RANGE = (1e-4, 10.0)
_OVERFLOWS = 20
# Keys that a sweep does not depend on: it has its own rate, keeps nothing and scores nothing.
_UNSEEN = (
    "optim.lr",
    "optim.schedule.",
    "threads",
    "data.workers",
    "data.prefetch",
    "data.resident",
    "checkpoints.",
    "limits.",
    "log.",
    "monitors.",
    "evaluators.",
)

SetSchedule = Callable[[Optimizer, Clock], ScheduledValues]


@dataclass(frozen=True, slots=True)
class SweepRange:
    """The rates of a sweep: `steps` of them from `first` to `last`."""

    first: float
    last: float
    steps: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """The losses of a sweep, one for each rate that was reached."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    stopped: bool
    """True if it ended because the loss ran away."""


def sweep_into(
    folder: Path, reference: str, overrides: Sequence[str], asked: SweepRange, console: Console
) -> tuple[Reading, dict[str, float]]:
    """Sweep a recipe and write all files; return the reading, and the rates that go into `optim`.

    Raises:
        RunError: the folder holds something else, or cannot be written.
        TrainingError: the curve has no usable slope; all but tuned.yaml is written.
    """
    recipe, name = read(reference, overrides), Path(reference).stem
    clear_results(folder, frozenset((CURVE, PICTURE, TUNED, RESULT)))
    console.notice(f"sweep: {asked.steps} updates, learning rate {asked.first:g} to {asked.last:g}")
    batches = {stage.batch_size or recipe.batch_size for stage in recipe.stages}
    if len(batches) > 1 or recipe.optim.lr == "linear":
        console.warning(
            "the stages differ in their batches, or optim.lr=linear follows them: what is found holds for the batch of "
            "the stage that is swept; give the others an lr_scale"
        )
    sweep = run_sweep(recipe, asked, console)
    reading = read_curve(sweep.rates, sweep.losses, stopped=sweep.stopped)
    rates = {} if reading.suggestion is None else scaled_rates(recipe, reading.suggestion)
    facts = {
        "recipe": reference,
        "overrides": list(overrides),
        "key": sweep_key(recipe),
        "rates": rates,
        **{key: value for key, value in asdict(reading).items() if key != "smoothed"},
        **asdict(asked),
        "done": len(sweep.losses),
        "stopped": sweep.stopped,
    }
    picture = draw_curve(name, sweep.rates, sweep.losses, reading)
    with writing(folder, WAY_OUT):
        write_atomic(folder / CURVE, _csv(sweep, reading).encode())
        write_atomic(folder / PICTURE, picture)
        if rates:
            found = {f"optim.{key}": rate for key, rate in rates.items()}
            text = tuned_recipe(reference, overrides, found, f"optim.lr by opsin tune lr: {reading.reason}")
            write_atomic(folder / TUNED, text.encode())
        # Last: a folder with the result has the other files too.
        write_atomic(folder / RESULT, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
    if reading.suggestion is None:
        raise TrainingError(f"{name}: no learning rate found: {reading.reason}; {folder / PICTURE} shows the curve")
    return reading, rates


def read_result(folder: Path, recipe: Recipe) -> dict[str, float] | None:
    """Return the rates that an earlier sweep of `recipe` found; None if it found none or is of another recipe."""
    try:
        result = json.loads((folder / RESULT).read_text())
        if result["key"] != sweep_key(recipe) or not result["rates"]:
            return None
        return {str(name): float(rate) for name, rate in result["rates"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or damaged
        return None


def sweep_key(recipe: Recipe) -> str:
    """A short hash of the keys that a sweep depends on; recipes with the same one get the same learning rate."""
    seen = {key: value for key, value in flatten(recipe).items() if not key.startswith(_UNSEEN)}
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def choose_range(recipe: Recipe, first: float | None, last: float | None, steps: int) -> SweepRange:
    """Return the range that was asked for, with the optimizer's own end for None.

    Raises:
        ConfigError: the range is empty, or has too few steps.
    """
    default = _ADAPTIVE_RANGE if isinstance(recipe.optim, AdamW) else _PLAIN_RANGE
    low = default[0] if first is None else first
    high = default[1] if last is None else last
    faults = []
    if steps < FEWEST_STEPS:
        faults.append(f"--steps {steps}: too few to see a slope; use {FEWEST_STEPS} or more, {STEPS} if in doubt")
    if not (math.isfinite(low) and math.isfinite(high) and 0 < low < high):
        faults.append(f"--from {low:g} --to {high:g}: must be two rates above 0, the smaller one first")
    if faults:
        raise ConfigError(*(f"command line: {fault}" for fault in faults))
    return SweepRange(low, high, steps)


def run_sweep(recipe: Recipe, asked: SweepRange, console: Console) -> Sweep:
    """Train `recipe` from its starting weights, each update with the next rate."""
    swept, unit = _swept_recipe(recipe, asked.steps)
    rates = sweep_rates(asked.first, asked.last, asked.steps)
    with temporary_run(swept, console) as run:
        losses, stopped = rising_losses(run, [rate / unit for rate in rates], console)
    return Sweep(tuple(rates[: len(losses)]), tuple(losses), stopped)


def rising_losses(run: Run, factors: Sequence[float], console: Console) -> tuple[list[float], bool]:
    """Return the losses of updates from the starting weights; True if they ran away, which ends them.

    Each update multiplies every learning rate that the run's own schedule sets by the next of `factors`.
    """
    state = run.start.fresh()
    plan = replace(run.plan, set_schedule=_rising(run.plan.set_schedule, factors))
    console.start(total_steps=len(factors), first_step=0, total_epochs=plan.clock(len(factors)).epoch)
    # Under fp16 a gradient that overflows only lowers the loss scale; a longer series of them means divergence.
    overflows = 0 if state.loss_scale is None else _OVERFLOWS
    divergence = Divergence()
    losses: list[float] = []
    cancelled = 0
    for batch in run.data.batches(0, len(factors)):
        report = train_step(state, batch, plan)
        loss = float(report.values["train/loss"])
        cancelled = 0 if float(report.applied) else cancelled + 1
        if math.isfinite(loss):
            losses.append(loss)
        if divergence.shows(loss) or cancelled > overflows:
            return losses, True
        console.progress(state.step, report.clock.epoch, {"train/loss": loss, "train/lr": report.scheduled.lr})
    return losses, False


def scaled_rates(recipe: Recipe, lr: float) -> dict[str, float]:
    """The learning rates of `recipe.optim` when `lr` is `lr` and the others keep their ratio to it."""
    ratio = lr / _unit(recipe)
    others = {name: rate for name, rate in recipe.optim if name.endswith("_lr") and isinstance(rate, float)}
    return {"lr": lr, **{name: float(f"{rate * ratio:.2g}") for name, rate in others.items()}}


def _swept_recipe(recipe: Recipe, steps: int) -> tuple[Recipe, float]:
    """Return the recipe that is trained, whose schedule is a constant rate, and this rate.

    It has one stage, one in which all layers train if there is any, and no end: what a run changes towards its end
    must not change within the sweep.
    """
    unit = _unit(recipe)
    optim = recipe.optim.model_copy(update={"lr": unit, "schedule": Constant()})
    whole = StageConfig.model_fields["train"].default
    stages = [stage for stage in recipe.stages if stage.train == whole] or recipe.stages
    stages = [stage.model_copy(update={"epochs": 1000.0 * steps}) for stage in stages[:1]]
    epochs = None if stages else 1000.0 * steps
    changes = {"optim": optim, "stages": stages, "epochs": epochs, "evaluators": {}, "monitors": {}}
    return recipe.model_copy(update=changes), unit


def _unit(recipe: Recipe) -> float:
    """The rate to which other rates of the recipe relate: its own, or the optimizer's default for a word."""
    lr = recipe.optim.lr
    if isinstance(lr, str):
        lr = type(recipe.optim).model_fields["lr"].default
    return lr if isinstance(lr, float | int) else 1.0


def _rising(steady: SetSchedule, factors: Sequence[float]) -> SetSchedule:
    """`steady` times the factor of each step, so that the groups keep their ratios."""

    def set_schedule(optimizer: Optimizer, clock: Clock) -> ScheduledValues:
        scheduled = steady(optimizer, clock)
        for group in optimizer.param_groups:
            group["lr"] *= factors[clock.step]
        return replace(scheduled, lr=scheduled.lr * factors[clock.step])

    return set_schedule


def _csv(sweep: Sweep, reading: Reading) -> str:
    rows = zip(sweep.rates, sweep.losses, reading.smoothed, strict=True)
    lines = [f"{step},{rate:.6g},{loss:.6g},{smoothed:.6g}" for step, (rate, loss, smoothed) in enumerate(rows)]
    return "\n".join(["step,lr,loss,smoothed", *lines]) + "\n"
