"""`opsin tune lr`: sweep the learning rate of a recipe, and report the best one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from opsin.reporting.console import open_console
from opsin.run.lr_curve import Reading
from opsin.run.recipe import read
from opsin.run.sweep import CURVE, PICTURE, RESULT, STEPS, choose_range, sweep_into
from opsin.run.tuned import TUNED


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
    """Sweep a recipe in `steps` updates from rate `first` to `last`; return the reading of its curve.

    The files are in `out`, by default runs/RECIPE-lr. The range is that of the optimizer by default.

    Raises:
        ConfigError: the recipe or the range is wrong.
        RunError: `out` holds something else, or cannot be written.
        TrainingError: the curve has no usable slope.
    """
    asked = choose_range(read(reference, overrides), first, last, steps)
    folder = out or Path("runs", f"{Path(reference).stem}-lr")
    console = open_console(quiet=quiet)
    reading, rates = sweep_into(folder, reference, overrides, asked, console)
    console.finish(_words(folder, rates, reading))
    return reading


def _words(folder: Path, rates: Mapping[str, float], reading: Reading) -> str:
    """The suggestion and its reason, for a terminal."""
    found = ", ".join(f"optim.{name} {rate:g}" for name, rate in rates.items())
    lines = [f"{found}: {reading.reason}", f"steepest descent: {reading.steepest:.2g}"]
    if reading.safe is not None:
        lines.append(f"safe: up to {reading.safe:.2g} (the loss has clearly risen at {reading.diverged:.2g})")
    lines.append(f"wrote {folder / TUNED} (train it with: opsin train {folder / TUNED}), {PICTURE}, {CURVE}, {RESULT}")
    return "\n".join(lines)
