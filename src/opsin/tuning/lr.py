"""`opsin tune lr`: train a moment with a rising learning rate, and read a good one from the losses.

Nothing of a run is touched: the sweep has weights of its own and writes into its own folder only.

FOLDER/
├── lr.csv        step, lr, loss, smoothed
├── lr.png        the curve, with what was read from it
├── lr.json       the numbers and the verdict
└── tuned.yaml    the recipe with the learning rate; missing where the curve has no usable slope
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch.optim import Optimizer

from opsin.clock.schedule import Constant
from opsin.clock.timeline import Clock
from opsin.errors import ConfigError, RunError, TrainingError
from opsin.reporting.console import Console, open_console
from opsin.run.assemble import temporary_run
from opsin.run.rates import RESULT, sweep_key
from opsin.run.recipe import Recipe, read, shipped
from opsin.run.session import in_words
from opsin.settings.text import shipped_recipes
from opsin.settings.yaml_tree import read_overrides
from opsin.storage.files import write_atomic
from opsin.training.loop import Run
from opsin.training.optim import AdamW
from opsin.training.stages import StageConfig
from opsin.training.state import Pace
from opsin.training.step import train_step
from opsin.tuning.lr_curve import FEWEST_STEPS, Divergence, Reading, read_curve, sweep_rates
from opsin.tuning.lr_plot import draw_curve

STEPS = 200
CURVE, PICTURE, TUNED = "lr.csv", "lr.png", "tuned.yaml"

_ADAPTIVE_RANGE = (1e-5, 1.0)
_PLAIN_RANGE = (1e-4, 10.0)
_OVERFLOWS = 20

SetPace = Callable[[Optimizer, Clock], Pace]


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
    """Whether it ended because the loss ran away."""


def tune_lr(
    reference: str,
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    first: float | None = None,
    last: float | None = None,
    steps: int = STEPS,
    quiet: bool = False,
) -> Reading:
    """What a sweep of `steps` updates from rate `first` to `last` says on a recipe; the files are in `out`.

    By default `out` is runs/RECIPE-lr, and the range is that of the optimizer.

    Raises:
        ConfigError: the recipe or the range is wrong.
        RunError: `out` holds something else, or cannot be written.
        TrainingError: the curve has no usable slope; all but tuned.yaml is written.
    """
    recipe = read(reference, overrides)
    asked = choose_range(recipe, first, last, steps)
    name = Path(reference).stem
    folder = out or Path("runs", f"{name}-lr")
    _clear(folder)
    console = open_console(quiet=quiet)
    console.notice(f"sweep: {asked.steps} updates, learning rate {asked.first:g} to {asked.last:g}")
    batches = {stage.batch_size or recipe.batch_size for stage in recipe.stages}
    if len(batches) > 1 or recipe.optim.lr == "linear":
        console.warning(
            "the stages differ in their batches, or optim.lr=linear follows them: what is found holds for the batch of "
            "the stage that is swept; give the others an lr_scale"
        )
    with in_words(recipe):
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
    _write(folder / CURVE, _csv(sweep, reading).encode())
    _write(folder / PICTURE, draw_curve(name, sweep.rates, sweep.losses, reading))
    if rates:
        _write(folder / TUNED, _tuned(reference, overrides, rates, reading).encode())
    # Last: who finds it finds the others too.
    _write(folder / RESULT, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())
    if reading.suggestion is None:
        raise TrainingError(f"{name}: no learning rate found: {reading.reason}; {folder / PICTURE} shows the curve")
    console.finish(_words(folder, rates, reading))
    return reading


def choose_range(recipe: Recipe, first: float | None, last: float | None, steps: int) -> SweepRange:
    """The range that was asked for, with the optimizer's own ends where None.

    Raises:
        ConfigError: it is no range, or too short.
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
    """The losses of `recipe` trained from its starting weights, each update with the next rate."""
    swept, unit = _swept_recipe(recipe, asked.steps)
    rates = sweep_rates(asked.first, asked.last, asked.steps)
    with temporary_run(swept, console) as run:
        losses, stopped = rising_losses(run, [rate / unit for rate in rates], console)
    return Sweep(tuple(rates[: len(losses)]), tuple(losses), stopped)


def rising_losses(run: Run, factors: Sequence[float], console: Console) -> tuple[list[float], bool]:
    """The losses of updates from the starting weights, and whether they ran away, which ends them.

    Each update multiplies every learning rate that the run's own schedule sets by the next of `factors`.
    """
    state = run.start.fresh()
    plan = replace(run.plan, set_pace=_rising(run.plan.set_pace, factors))
    console.start(total_steps=len(factors), first_step=0, total_epochs=plan.clock(len(factors)).epoch)
    # Under fp16 a gradient that overflows only tells the loss scale to fall; not so many times on end.
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
        console.progress(state.step, report.clock.epoch, {"train/loss": loss, "train/lr": report.pace.lr})
    return losses, False


def scaled_rates(recipe: Recipe, lr: float) -> dict[str, float]:
    """The learning rates of `recipe.optim` when `lr` is `lr` and the others keep their ratio to it."""
    ratio = lr / _unit(recipe)
    others = {name: rate for name, rate in recipe.optim if name.endswith("_lr") and isinstance(rate, float)}
    return {"lr": lr, **{name: float(f"{rate * ratio:.2g}") for name, rate in others.items()}}


def _clear(folder: Path) -> None:
    """Make the folder, without the results of an earlier sweep: none may be taken for those of this one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = {CURVE, PICTURE, TUNED, RESULT}
        others = sorted(item.name for item in folder.iterdir() if item.name not in ours and item.name[0] != ".")
        if others:
            raise RunError(
                f"{folder}: holds other files ({others[0]}{', ...' if len(others) > 1 else ''}); "
                "choose an empty or a new folder with --out"
            )
        for name in ours:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _swept_recipe(recipe: Recipe, steps: int) -> tuple[Recipe, float]:
    """The recipe that is trained, whose schedule is a constant rate, and this rate.

    It is that of a stage in which all layers train, if there is one, and without an end: what a run changes towards
    its end must not change within the sweep.
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
    """The rate that other rates of the recipe are meant for: its own, or the optimizer's default for a word."""
    lr = recipe.optim.lr
    if isinstance(lr, str):
        lr = type(recipe.optim).model_fields["lr"].default
    return lr if isinstance(lr, float | int) else 1.0


def _rising(steady: SetPace, factors: Sequence[float]) -> SetPace:
    """`steady` times the factor of each step, so that the groups keep their ratios."""

    def set_pace(optimizer: Optimizer, clock: Clock) -> Pace:
        pace = steady(optimizer, clock)
        for group in optimizer.param_groups:
            group["lr"] *= factors[clock.step]
        return replace(pace, lr=pace.lr * factors[clock.step])

    return set_pace


def _csv(sweep: Sweep, reading: Reading) -> str:
    rows = zip(sweep.rates, sweep.losses, reading.smoothed, strict=True)
    lines = [f"{step},{rate:.6g},{loss:.6g},{smoothed:.6g}" for step, (rate, loss, smoothed) in enumerate(rows)]
    return "\n".join(["step,lr,loss,smoothed", *lines]) + "\n"


def _tuned(reference: str, overrides: Sequence[str], rates: Mapping[str, float], reading: Reading) -> str:
    """A recipe that is the swept one with the rates that were found."""
    base = reference if reference in shipped_recipes(shipped) else str(Path(reference).expanduser().resolve())
    tree, _ = read_overrides([*overrides, *(f"optim.{name}={rate!r}" for name, rate in rates.items())])
    lines = [f"# optim.lr by opsin tune lr: {reading.reason}", f"extends: {_yaml(base)}"]
    return "\n".join([*lines, *(f"{key}: {_yaml(value)}" for key, value in _leaves(tree.plain(), ""))]) + "\n"


def _leaves(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, item in value.items():
        yield from _leaves(item, f"{prefix}.{key}" if prefix else key)


def _yaml(value: object) -> str:
    # JSON is YAML too.
    return json.dumps(value, ensure_ascii=False)


def _words(folder: Path, rates: Mapping[str, float], reading: Reading) -> str:
    """The suggestion and its reason, for the terminal."""
    found = ", ".join(f"optim.{name} {rate:g}" for name, rate in rates.items())
    lines = [f"{found}: {reading.reason}", f"steepest descent: {reading.steepest:.2g}"]
    if reading.safe is not None:
        lines.append(f"safe: up to {reading.safe:.2g} (the loss has clearly risen at {reading.diverged:.2g})")
    lines.append(f"wrote {folder / TUNED} (train it with: opsin train {folder / TUNED}), {PICTURE}, {CURVE}, {RESULT}")
    return "\n".join(lines)


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written: {error.strerror or error}; choose another folder with --out, or make room for it"
    )
