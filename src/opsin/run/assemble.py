"""From a recipe to a run: every object of a training is built here, in reading order."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from opsin.clock.seeding import fold_in
from opsin.clock.timeline import Timeline
from opsin.data.base import DataFacts
from opsin.data.loading import TrainingData
from opsin.errors import RunError
from opsin.export.encoder import CARD_FILE, EncoderCard, describe_encoder, write_card
from opsin.methods.base import Method
from opsin.nn.ema import EmaConfig, ModelEma, ema_decay
from opsin.nn.heads import Classifier
from opsin.nn.weights import initialise
from opsin.processes.world import World, join
from opsin.reporting.console import Console
from opsin.reporting.journal import Journal
from opsin.run.assemble_guard import build_alerts, reach, streak_answer
from opsin.run.images import evaluation_context, open_images, training_data
from opsin.run.numerics import Numerics, choose_numbers, place, settle_numerics
from opsin.run.recipe import Recipe
from opsin.settings.text import to_yaml
from opsin.storage.directory import RunDirectory
from opsin.storage.files import write_atomic
from opsin.storage.teller import Fact
from opsin.training import precision
from opsin.training.checkpoints.checkpoints import Checkpoints
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.evaluations import Evaluations
from opsin.training.evaluator import EvaluationContext, Evaluator, EvaluatorConfig
from opsin.training.freeze import LayerFreezer
from opsin.training.guard import Guard
from opsin.training.loop import Run
from opsin.training.memory import Splits, save_memory, uses_batch_statistics
from opsin.training.monitor import Monitor
from opsin.training.observe import Observations
from opsin.training.optim import build_optimizer, pace_setter
from opsin.training.profile.profile import Profile, StepProfile
from opsin.training.stages import announce_stage, plan_stages, plan_time
from opsin.training.state import GradientViewer, LossScale, StepPlan, TrainState
from opsin.training.stop import Stop

Say = Callable[[str], None]


def assemble(
    recipe: Recipe,
    directory: RunDirectory,
    journal: Journal,
    console: Console,
    *,
    fingerprint: str,
    on_written: Callable[[Path], None] = lambda path: None,
) -> Run:
    """A run that `fit` can train. Everything that can be checked before the first step is checked here.

    `on_written` gets each checkpoint once it is complete, in the thread that writes.

    Raises:
        ConfigError: settings do not fit together, the data, or this machine.
        DataError: the images cannot be used.
        CheckpointError: the starting weights do not fit.
    """
    world = join()
    device, number_format = choose_numbers(recipe, console.notice)
    images = open_images(recipe, console.notice)
    timeline = plan_time(recipe, images.train, console.notice)
    method = build_method(recipe, images.facts)
    freezer = plan_stages(recipe.optim.schedule, timeline, method)
    numerics = settle_numerics(recipe, method, device, number_format, console.notice)
    save_memory(recipe.memory, method)
    method = place(method, numerics)
    card = _card(recipe, images.facts, method, fingerprint)
    data = training_data(recipe, images, timeline, method, numerics, directory, world)
    splits = _splits(recipe, method, directory, journal, console)
    monitors = {name: wanted.build(timeline) for name, wanted in recipe.monitors.items()}
    plan = _step_plan(recipe, timeline, method, freezer, numerics, splits, monitors.values(), world)
    steps = min(timeline.total_steps, recipe.limits.steps or timeline.total_steps)
    go_on = partial(_go_on, recipe, card, directory, journal, last_step=steps)
    checkpoints = _checkpoints(recipe, timeline, directory, journal, console, fingerprint, steps, go_on, on_written)
    alerts = build_alerts(recipe, timeline, journal, console, monitors, last_step=steps)
    observations = Observations(
        journal,
        timeline,
        console,
        every=recipe.log.every,
        last_step=steps,
        limit=recipe.limits.cancelled_in_a_row,
        monitors=[(recipe.monitors[name].every, monitor) for name, monitor in monitors.items()],
        also_when=lambda state: checkpoints.is_due(state) or evaluations.is_due(state.step),
        on_stage=partial(announce_stage, timeline, freezer, journal, console),
        on_streak=streak_answer(recipe, alerts),
    )
    context = evaluation_context(recipe, images, numerics, console, directory.path)
    watchers = (checkpoints, observations)
    evaluations = _evaluations(recipe, timeline, journal, console, context, method, *watchers, last_step=steps)
    resuming = bool(find_checkpoints(directory.checkpoints))
    fresh = partial(_fresh_state, recipe, method, numerics, data, console.notice, resuming=resuming)
    start_over = partial(_start_over, recipe, images.facts, numerics, data, freezer)
    guard = Guard(recipe.guard, timeline, checkpoints, journal, console, start_over=start_over)
    stop = Stop(hours=recipe.limits.hours)
    profile = _profile(recipe, directory, console, device, observations, evaluations, last_step=steps)
    return Run(fresh, data, plan, steps, *watchers, evaluations, alerts, guard, stop, directory, profile)


def _checkpoints(
    recipe: Recipe,
    timeline: Timeline,
    directory: RunDirectory,
    journal: Journal,
    console: Console,
    fingerprint: str,
    last_step: int,
    go_on: Callable[[int], None],
    on_written: Callable[[Path], None],
) -> Checkpoints:
    return Checkpoints(
        directory.checkpoints,
        recipe.checkpoints,
        timeline,
        fingerprint=fingerprint,
        say=partial(_tell, journal, console),
        last_step=last_step,
        on_restore=go_on,
        before_write=journal.sync,
        on_written=on_written,
        margin=reach(recipe, timeline),
        check=directory.check_held,
        scores=partial(_history, journal),
    )


def _history(journal: Journal, name: str) -> Mapping[int, float]:
    """What the log holds of a value, by step."""
    return {row.step: row.values[name] for row in journal.rows() if name in row.values}


def _evaluations(
    recipe: Recipe,
    timeline: Timeline,
    journal: Journal,
    console: Console,
    context: EvaluationContext,
    method: Method,
    checkpoints: Checkpoints,
    observations: Observations,
    *,
    last_step: int,
) -> Evaluations:
    scored = recipe.evaluators.items()
    return Evaluations(
        journal,
        timeline,
        {prefix: (wanted.every, _evaluator(wanted, prefix, context, method)) for prefix, wanted in scored},
        console=console,
        observations=observations,
        last_step=last_step,
        on_scores=checkpoints.note_scores,
        features=context.features,
    )


def _evaluator(wanted: EvaluatorConfig, prefix: str, context: EvaluationContext, method: Method) -> Evaluator:
    wanted.check(method, prefix)
    return wanted.build(context, prefix)


def _go_on(
    recipe: Recipe, card: EncoderCard, directory: RunDirectory, journal: Journal, step: int, *, last_step: int
) -> None:
    """Forget what the run did after `step`, and write down what it is from there on.

    Not before this moment: a recipe that cannot go on must not take the place of the one that can.
    """
    journal.rewind(step)
    try:
        write_atomic(directory.recipe, to_yaml(recipe, comments=False).encode())
        write_card(directory.path / CARD_FILE, card)
        if step < last_step:
            # The weights of an earlier end: those who read the run would take them for the newest.
            directory.model.unlink(missing_ok=True)
            directory.averaged.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{directory.path}: cannot be written: {reason}; make room, or choose another --out") from error


def build_method(recipe: Recipe, facts: DataFacts) -> Method:
    """The method with fresh weights that follow from the seed."""
    torch.manual_seed(fold_in(recipe.seed, "weights"))
    return recipe.method.build(recipe.model, facts)


def _splits(recipe: Recipe, method: Method, directory: RunDirectory, journal: Journal, console: Console) -> Splits:
    """Where batches are split because memory ended; none where the recipe forbids it."""
    policy = recipe.memory.on_out_of_memory
    if policy == "stop" or (policy == "split" and uses_batch_statistics(method)):
        return Splits()
    sizes = [stage.batch_size or recipe.batch_size for stage in recipe.stages] or [recipe.batch_size]
    asked = f"batch_size {sizes} in accumulate {recipe.accumulate}"
    splits = Splits(directory.splits, asked=asked, say=partial(_tell, journal, console))
    if splits.found:
        newest = splits.found[-1]
        place = f"from step {newest.step + 1} on, where memory ended ({directory.splits.name})"
        console.notice(f"accumulate: {recipe.accumulate * newest.factor} {place}")
    return splits


def _step_plan(
    recipe: Recipe,
    timeline: Timeline,
    method: Method,
    freezer: LayerFreezer,
    numerics: Numerics,
    splits: Splits,
    monitors: Iterable[Monitor],
    world: World,
) -> StepPlan:
    ema = recipe.ema or EmaConfig()
    viewers = [monitor for monitor in monitors if isinstance(monitor, GradientViewer)]

    def show_gradients(method: Method, step: int) -> None:
        for viewer in viewers:
            viewer.view_gradients(method, step)

    return StepPlan(
        forward=torch.compile(method) if recipe.compile else method,
        clock=timeline.clock,
        set_pace=pace_setter(recipe.optim, method),
        set_layers=freezer,
        show_gradients=show_gradients,
        ema_decay=partial(ema_decay, decay=ema.decay, warmup=ema.warmup),
        autocast=precision.autocast(numerics.device, numerics.precision),
        seed=recipe.seed,
        accumulate=recipe.accumulate,
        splits=splits,
        view_chunk=recipe.memory.view_chunk,
        clip_norm=recipe.optim.clip_norm,
        clip_each=recipe.optim.clip == "each",
        rank=world.rank,
    )


def _fresh_state(
    recipe: Recipe, method: Method, numerics: Numerics, data: TrainingData, say: Say, *, resuming: bool
) -> TrainState:
    """The state before step 0; with `resuming`, one whose weights a checkpoint will replace."""
    data.load()
    if not resuming:
        report = initialise(method.backbone, recipe.model)
        for line in report.lines() if report is not None else ():
            say(line)
        method.prepare(lambda: next(iter(data.batches(0, 1))))
    method.train()
    scale = LossScale.start(numerics.device) if numerics.precision == "fp16" else None
    ema = None if recipe.ema is None else ModelEma(method)
    return TrainState(method, build_optimizer(recipe.optim, method), scale, ema)


def _start_over(
    recipe: Recipe,
    facts: DataFacts,
    numerics: Numerics,
    data: TrainingData,
    freezer: LayerFreezer,
    state: TrainState,
) -> None:
    """Take a state back to what it was before step 0: the same bits, since all follows from the seed."""
    method = build_method(recipe, facts)
    for param, begun in zip(state.method.parameters(), method.parameters(), strict=True):
        param.requires_grad_(begun.requires_grad)  # a stage may have frozen it
    state.method.load_state_dict(method.state_dict())
    fresh = _fresh_state(recipe, state.method, numerics, data, lambda line: None, resuming=False)
    state.optimizer, state.loss_scale, state.ema = fresh.optimizer, fresh.loss_scale, fresh.ema
    freezer.forget()


def _profile(
    recipe: Recipe,
    directory: RunDirectory,
    console: Console,
    device: torch.device,
    observations: Observations,
    evaluations: Evaluations,
    *,
    last_step: int,
) -> Profile:
    if not recipe.profile.steps:
        return Profile()
    return StepProfile(
        recipe.profile,
        directory.profile,
        console,
        device=device,
        last_step=last_step,
        interrupted=evaluations.is_due,
        paused=observations.paused,
    )


def _card(recipe: Recipe, facts: DataFacts, method: Method, fingerprint: str) -> EncoderCard:
    """What `opsin.load` needs beside the weights, so that a run can be used without its images."""
    head = getattr(method, "head", None)
    return describe_encoder(
        method.backbone,
        head=head if isinstance(head, Classifier) else None,
        model=recipe.model,
        facts=facts,
        resize=recipe.data.eval_resize or recipe.data.image_size,
        method=recipe.method.name,
        recipe=fingerprint,
    )


def _tell(journal: Journal, console: Console, kind: str, facts: Mapping[str, Fact]) -> None:
    """An event of the checkpoints, for the journal and where it matters for the reader."""
    others = {name: value for name, value in facts.items() if name != "step"}
    step = facts["step"]
    assert isinstance(step, int)
    journal.event(kind, step, **others)
    if "warning" in facts:
        console.warning(str(facts["warning"]))
    elif kind == "resumed":
        console.notice(f"resumed from the checkpoint of step {step}")
