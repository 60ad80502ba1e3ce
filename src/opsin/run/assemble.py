"""From the parts of a recipe to a run: every object of a training is built here, in reading order."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from opsin.clock.timeline import Timeline
from opsin.methods.base import Method
from opsin.nn.ema import EmaConfig, ema_decay
from opsin.processes.world import World, join
from opsin.reporting.console import Console
from opsin.reporting.journal import Journal
from opsin.reporting.teller import RunTeller
from opsin.run.fit import fitted
from opsin.run.images import Images, evaluation_context, loading_plan, training_data
from opsin.run.numerics import explain_torch_errors
from opsin.run.parts import Parts, build_parts
from opsin.run.recipe import Recipe, fingerprint
from opsin.run.start import RunStart, card_of
from opsin.run.threads import computing
from opsin.storage.directory import RunDirectory
from opsin.training import precision
from opsin.training.agenda import Agenda
from opsin.training.alerts import Alerts
from opsin.training.checkpoints.checkpoints import Checkpoints, Copies
from opsin.training.evaluations import Evaluations
from opsin.training.evaluator import EvaluationContext, Evaluator
from opsin.training.guard import Guard
from opsin.training.loop import Profile, Run
from opsin.training.memory import PartFallback, uses_batch_statistics
from opsin.training.monitor import Monitor
from opsin.training.observe import Observations
from opsin.training.optim import schedule_setter
from opsin.training.profile.profile import StepProfile
from opsin.training.state import GradientViewer, StepPlan
from opsin.training.stop import Stop


def assemble(parts: Parts, directory: RunDirectory, teller: RunTeller, backup: Copies | None = None) -> Run:
    """A run that `fit` can train. Everything that can be checked before the first step is checked here.

    Raises:
        ConfigError: settings do not fit together, the data, or this machine.
        DataError: the images cannot be used.
        RunError: a file of the run is damaged.
    """
    recipe, timeline, method = parts.recipe, parts.timeline, parts.method
    world = join()
    agenda = plan_agenda(recipe, timeline)
    card = card_of(parts)
    stop = Stop(hours=recipe.limits.hours)
    loading = loading_plan(recipe, parts.images, parts.numerics, teller, stop)
    data = training_data(recipe, loading, timeline, method, directory, world)
    fallback = _part_fallback(recipe, method, directory, teller)
    monitors = {name: wanted.build(timeline) for name, wanted in recipe.monitors.items()}
    plan = _step_plan(parts, fallback, monitors.values(), world)
    checkpoints = Checkpoints(directory, recipe.checkpoints, agenda, teller, backup, fingerprint=fingerprint(recipe))
    alerts = Alerts(teller, agenda, {name: (recipe.monitors[name].action, monitors[name]) for name in monitors})
    observations = Observations(
        teller,
        agenda,
        limit=recipe.limits.cancelled_in_a_row,
        monitors=monitors,
        saves=checkpoints,
        freezer=parts.freezer,
        alerts=alerts if recipe.guard.cancelled == "rollback" else None,
    )
    context = evaluation_context(recipe, parts.images, parts.numerics, loading, directory.path)
    evaluations = Evaluations(
        teller,
        agenda,
        {prefix: _evaluator(recipe, prefix, context, method) for prefix in recipe.evaluators},
        observations=observations,
        best=checkpoints,
        features=context.features,
    )
    start = RunStart(parts, data, directory, teller, card, agenda.last_step)
    guard = Guard(recipe.guard, agenda, checkpoints, teller, start)
    profile = _profile(parts, directory, teller, agenda, observations)
    watchers = (checkpoints, observations, evaluations, alerts, guard)
    return Run(start, data, plan, agenda, *watchers, stop, directory, profile)


@contextmanager
def temporary_run(recipe: Recipe, console: Console, images: Images | None = None) -> Iterator[Run]:
    """The run of `recipe` in a directory of its own, which is removed: to be measured, not to be kept.

    `images` are as in `build_parts`.

    Raises:
        ConfigError: as `assemble`, and as `explain_torch_errors`; so TrainingError, DataError and CheckpointError.
    """
    with tempfile.TemporaryDirectory(prefix="opsin-run-", ignore_cleanup_errors=True) as folder:
        directory = RunDirectory(Path(folder))
        with closing(Journal(directory.path, teller=console)) as journal:
            teller = RunTeller(journal, console)
            with (
                explain_torch_errors(recipe),
                computing(recipe.threads, precision.choose_device(recipe.device), teller),
                fitted(build_parts(recipe, teller, images), teller) as parts,
            ):
                yield assemble(parts, directory, teller)


def plan_agenda(recipe: Recipe, timeline: Timeline) -> Agenda:
    """The agenda of the recipe."""
    delays = [one.delay(recipe.log.every, timeline) for one in recipe.monitors.values() if one.action == "rollback"]
    if recipe.guard.cancelled == "rollback":
        delays.append(recipe.limits.cancelled_in_a_row + recipe.log.every)
    return Agenda(
        timeline,
        min(timeline.total_steps, recipe.limits.steps or timeline.total_steps),
        rows=recipe.log.every,
        checkpoints=recipe.checkpoints.every,
        milestones=recipe.checkpoints.milestones or "never",
        evaluators={name: wanted.every for name, wanted in recipe.evaluators.items()},
        monitors={name: wanted.every for name, wanted in recipe.monitors.items()},
        margin=recipe.guard.margin,
        delay=max(delays, default=None),
    )


def _evaluator(recipe: Recipe, prefix: str, context: EvaluationContext, method: Method) -> Evaluator:
    wanted = recipe.evaluators[prefix]
    wanted.check(method, prefix)
    return wanted.build(context, prefix)


def _part_fallback(recipe: Recipe, method: Method, directory: RunDirectory, teller: RunTeller) -> PartFallback:
    """The steps from which batches are computed in more parts because memory ended."""
    policy = recipe.memory.on_out_of_memory
    if policy == "stop" or (policy == "split" and uses_batch_statistics(method)):
        return PartFallback()
    sizes = [stage.batch_size or recipe.batch_size for stage in recipe.stages] or [recipe.batch_size]
    asked = f"batch_size {sizes} in accumulate {recipe.accumulate}"
    fallback = PartFallback(directory.splits, asked=asked, teller=teller)
    if fallback.found:
        newest = fallback.found[-1]
        since = f"from step {newest.step + 1} on, where memory ended ({directory.splits.name})"
        teller.notice(f"accumulate: {recipe.accumulate * newest.factor} {since}")
    return fallback


def _step_plan(parts: Parts, fallback: PartFallback, monitors: Iterable[Monitor], world: World) -> StepPlan:
    recipe, method, numerics = parts.recipe, parts.method, parts.numerics
    ema = recipe.ema or EmaConfig()
    if recipe.compile:
        method.compile_networks()
    viewers = [monitor for monitor in monitors if isinstance(monitor, GradientViewer)]

    def show_gradients(method: Method, step: int) -> None:
        for viewer in viewers:
            viewer.view_gradients(method, step)

    return StepPlan(
        forward=method,
        clock=parts.timeline.clock,
        set_schedule=schedule_setter(recipe.optim, method),
        set_layers=parts.freezer,
        show_gradients=show_gradients,
        ema_decay=partial(ema_decay, decay=ema.decay, warmup=ema.warmup),
        autocast=precision.autocast(numerics.device, numerics.precision),
        seed=recipe.seed,
        accumulate=recipe.accumulate,
        fallback=fallback,
        view_chunk=recipe.memory.view_chunk,
        clip_norm=recipe.optim.clip_norm,
        clip_each=recipe.optim.clip == "each",
        rank=world.rank,
    )


def _profile(
    parts: Parts, directory: RunDirectory, teller: RunTeller, agenda: Agenda, observations: Observations
) -> Profile:
    wanted = parts.recipe.profile
    if not wanted.steps:
        return Profile()
    return StepProfile(wanted, directory.profile, teller, agenda, observations, device=parts.numerics.device)
