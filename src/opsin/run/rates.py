"""`optim.lr=auto`: a sweep finds the learning rates before a run begins."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from opsin.errors import OpsinError
from opsin.processes.trail import VARIABLE
from opsin.reporting.console import open_console
from opsin.run.recipe import Recipe, read
from opsin.run.sweep import STEPS, choose_range, read_result, sweep_into
from opsin.settings.text import diff, to_yaml
from opsin.storage.files import write_atomic, writing
from opsin.storage.teller import Teller
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.precision import choose_device, forget_peak, release_memory


def settle_rates(recipe: Recipe, out: Path, *, name: str, teller: Teller) -> Recipe:
    """Return the recipe with learning rates for the word `auto`: those of the run in `out`, or of a sweep.

    The sweep is kept beside `out`.

    Raises:
        OpsinError: the sweep found none.
    """
    if recipe.optim.lr != "auto":
        return recipe
    if (out / "recipe.yaml").exists() and find_checkpoints(out / "checkpoints"):
        before = read(str(out / "recipe.yaml"))
        # Equal but for the rates, if nothing differs once these are taken over.
        if before.optim.name == recipe.optim.name:
            known = {key: getattr(before.optim, key) for key in ("lr", "other_lr") if hasattr(before.optim, key)}
            if not diff(before, settled := _with_rates(recipe, known)):
                return settled
    return _with_rates(recipe, find_rates(recipe, out.with_name(f"{out.name}-lr"), name=name, teller=teller))


def find_rates(recipe: Recipe, folder: Path, *, name: str, teller: Teller) -> Mapping[str, float]:
    """Return the learning rates for `recipe`: `lr`, and each other one of `optim` that follows it.

    `folder` keeps the files of the sweep; a later call for the same recipe reads the result there.

    Raises:
        OpsinError: as `sweep_into`; so ConfigError, DataError and CheckpointError of the recipe.
    """
    known = read_result(folder, recipe)
    if known is not None:
        teller.notice(f"optim.lr=auto: {_shown(known)}, found before ({folder})")
        return known
    teller.notice(f"optim.lr=auto: sweeping the learning rate first ({folder})")
    wanted = folder / ".sweep" / f"{name}.yaml"  # hidden: the sweep wants the folder for itself
    with writing(folder, "choose another --out"):
        wanted.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(wanted, to_yaml(recipe, comments=False).encode())
    try:
        with _apart_from_the_run(recipe):
            asked = choose_range(recipe, None, None, STEPS)
            _, rates = sweep_into(folder, str(wanted), (), asked, open_console(quiet=True))
    except OpsinError as error:
        raise type(error)(*(f"optim.lr=auto: {fault}" for fault in error.faults)) from error
    teller.notice(f"optim.lr=auto: {_shown(rates)}")
    return rates


@contextmanager
def _apart_from_the_run(recipe: Recipe) -> Iterator[None]:
    """Keep a sweep out of the memory of the run that follows, and out of the trail that a supervisor reads.

    A step or an image at which a sweep crashes is none of the run.
    """
    trail = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if trail is not None:
            os.environ[VARIABLE] = trail
        device = choose_device(recipe.device)
        release_memory(device)
        forget_peak(device)


def _with_rates(recipe: Recipe, rates: Mapping[str, object]) -> Recipe:
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update=dict(rates))})


def _shown(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={rate:g}" for name, rate in rates.items())
