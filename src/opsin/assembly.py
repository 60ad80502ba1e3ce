"""From a recipe to a run: every object of a training is built here, in reading order."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from opsin.config import to_yaml
from opsin.console import Console
from opsin.data.base import DataFacts, Source
from opsin.data.holdout import hold_out
from opsin.data.loading import EvaluationData, TrainingData
from opsin.data.order import Order
from opsin.data.quarantine import Quarantine
from opsin.data.sources import Opened, open_sources
from opsin.distributed import World, join
from opsin.errors import RunError
from opsin.evaluation.labelled import LabelledImages, spread_evenly
from opsin.export import CARD_FILE, EncoderCard, describe_encoder, write_card
from opsin.methods.base import Method
from opsin.nn.attention import choose_attention, set_attention
from opsin.nn.ema import ModelEma, ema_decay
from opsin.nn.heads import Classifier
from opsin.nn.weights import initialise
from opsin.recipe import DataConfig, EmaConfig, Recipe
from opsin.reporting import Fact, Journal
from opsin.rundir import RunDirectory, write_atomic
from opsin.seeding import fold_in
from opsin.stages import announce_stage, plan_stages, plan_time
from opsin.timeline import Timeline
from opsin.training import precision
from opsin.training.alerts import Alerts
from opsin.training.checkpoint import Checkpoints, find_checkpoints
from opsin.training.freeze import LayerFreezer
from opsin.training.loop import Run
from opsin.training.memory import save_memory
from opsin.training.observe import Evaluations, Evaluator, EvaluatorConfig, Observations
from opsin.training.optim import build_optimizer, pace_setter
from opsin.training.profile import Profile, StepProfile
from opsin.training.scene import Scene
from opsin.training.state import LossScale, StepPlan, TrainState
from opsin.training.stop import Stop

Say = Callable[[str], None]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": ((0.3053, 0.3053, 0.3053), (0.3760, 0.3760, 0.3760)),
}


@dataclass(frozen=True, slots=True)
class Images:
    """Both sides of the data, and what a method may know of them."""

    train: Source
    val: Source | None
    facts: DataFacts


@dataclass(frozen=True, slots=True)
class Numerics:
    """How this machine computes a recipe."""

    device: torch.device
    precision: str
    attention: str
    channels_last: bool


def assemble(recipe: Recipe, directory: RunDirectory, journal: Journal, console: Console, *, fingerprint: str) -> Run:
    """A run that `fit` can train. Everything that can be checked before the first step is checked here.

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
    freezer = plan_stages(recipe, timeline, method)
    numerics = settle_numerics(recipe, method, device, number_format, console.notice)
    save_memory(recipe.memory, method)
    method = place(method, numerics)
    card = _card(recipe, images.facts, method, fingerprint)
    data = _training_data(recipe, images, timeline, method, numerics, directory, world)
    plan = _step_plan(recipe, timeline, method, freezer, numerics, world)
    steps = min(timeline.total_steps, recipe.limits.steps or timeline.total_steps)
    checkpoints = Checkpoints(
        directory.checkpoints,
        recipe.checkpoints,
        timeline,
        fingerprint=fingerprint,
        say=partial(_tell, journal, console),
        last_step=steps,
        on_restore=partial(_go_on, recipe, card, directory, journal, last_step=steps),
    )
    monitors = {name: wanted.build(timeline) for name, wanted in recipe.monitors.items()}
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
    )
    scored = recipe.evaluators.items()
    scene = build_scene(recipe, images, numerics, console, directory.path)
    evaluations = Evaluations(
        journal,
        timeline,
        {prefix: (wanted.every, _evaluator(wanted, prefix, scene, method)) for prefix, wanted in scored},
        console=console,
        observations=observations,
        last_step=steps,
        on_scores=checkpoints.note_scores,
    )
    actions = {name: (recipe.monitors[name].action, monitor) for name, monitor in monitors.items()}
    alerts = Alerts(journal, timeline, console, actions)
    resuming = bool(find_checkpoints(directory.checkpoints))
    fresh = partial(_fresh_state, recipe, method, numerics, data, console.notice, resuming=resuming)
    stop = Stop(hours=recipe.limits.hours)
    profile = _profile(recipe, directory, console, device, observations, evaluations, last_step=steps)
    return Run(fresh, data, plan, steps, checkpoints, observations, evaluations, alerts, stop, directory, profile)


def _evaluator(wanted: EvaluatorConfig, prefix: str, scene: Scene, method: Method) -> Evaluator:
    wanted.check(method, prefix)
    return wanted.build(scene, prefix)


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
        raise RunError(f"{directory.path}: cannot be written: {error}; make room, or choose another --out") from error


def choose_numbers(recipe: Recipe, say: Say) -> tuple[torch.device, str]:
    """The device and the number format, with torch's switches set for them.

    Raises:
        ConfigError: the machine lacks what the recipe asks for.
    """
    device = precision.choose_device(recipe.device)
    choice = precision.choose_precision(recipe.precision, device)
    say(f"device: {device} ({precision.describe_device(device)})")
    say(f"precision: {choice.value} ({choice.reason})")
    for line in precision.configure(device, choice.value, deterministic=recipe.deterministic):
        say(line)
    return device, choice.value


def open_images(recipe: Recipe, say: Say) -> Images:
    """The training and validation images; without a split of their own, some are held out.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    wanted = recipe.data
    opened = open_sources(
        wanted.path,
        kind=wanted.kind,
        labels=wanted.labels,
        image_column=wanted.image_column,
        label_column=wanted.label_column,
        cache=Path(os.path.expanduser(wanted.cache)),
    )
    say(f"data: {opened.said}")
    train, val = opened.train, opened.val
    if val is None and wanted.holdout > 0:
        # Also where nothing evaluates: looking never changes which images train.
        train, val = hold_out(train, wanted.holdout, recipe.seed)
        say(f"data: held out {len(val):,} of them for validation (data.holdout={wanted.holdout:g})")
    mean, std = _STATISTICS.get(opened.kind, _IMAGENET)
    facts = DataFacts(
        classes=train.classes,
        samples=len(train),
        image_size=wanted.image_size,
        channels=3,
        mean=wanted.mean or mean,
        std=wanted.std or std,
        unlabelled=int((train.labels < 0).sum()),
    )
    return Images(train, val, facts)


def build_method(recipe: Recipe, facts: DataFacts) -> Method:
    """The method with fresh weights that follow from the seed."""
    torch.manual_seed(fold_in(recipe.seed, "weights"))
    return recipe.method.build(recipe.model, facts)


def settle_numerics(recipe: Recipe, method: Method, device: torch.device, number_format: str, say: Say) -> Numerics:
    """What `auto` means for this network on this device."""
    kind, reason = choose_attention(device, number_format)
    if recipe.attention != "auto":
        kind, reason = recipe.attention, "asked for"
    if set_attention(method, kind):
        say(f"attention: {kind} ({reason})")
    channels_last = recipe.channels_last
    if channels_last == "auto":
        # A vision transformer has one convolution, its patch embedding.
        channels_last = sum(isinstance(module, nn.Conv2d) for module in method.modules()) > 1
    return Numerics(device, number_format, kind, channels_last)


def place(method: Method, numerics: Numerics) -> Method:
    """The method on its device, in its memory format."""
    if numerics.channels_last:
        method = method.to(memory_format=torch.channels_last)
    return method.to(numerics.device)


def build_scene(recipe: Recipe, images: Images, numerics: Numerics, console: Console, folder: Path) -> Scene:
    """What evaluators may look at; `folder` is the run directory."""

    def still(source: Source) -> EvaluationData:
        return still_data(recipe, source, images.facts, numerics, console)

    def open_path(path: str) -> Opened:
        opened = open_sources(path, cache=Path(os.path.expanduser(recipe.data.cache)))
        console.notice(f"labelled images: {opened.said}")
        return opened

    return Scene(
        None if images.val is None else still(images.val),
        LabelledImages(images.train, images.val, open_path=open_path, still=still),
        lambda count: still(spread_evenly(images.train if images.val is None else images.val, count)),
        precision.autocast(numerics.device, numerics.precision),
        numerics.device,
        folder,
    )


def still_data(
    recipe: Recipe, source: Source, facts: DataFacts, numerics: Numerics, console: Console
) -> EvaluationData:
    """The images of a source as evaluators see them, normalised as `facts` says."""
    return EvaluationData(
        source,
        facts=replace(
            facts,
            classes=source.classes,
            samples=len(source),
            unlabelled=int((source.labels < 0).sum()),
        ),
        resize=recipe.data.eval_resize or recipe.data.image_size,
        device=numerics.device,
        workers=_count_workers(recipe.data),
        resident=recipe.data.resident,
        channels_last=numerics.channels_last,
        warn=console.warning,
    )


def _training_data(
    recipe: Recipe,
    images: Images,
    timeline: Timeline,
    method: Method,
    numerics: Numerics,
    directory: RunDirectory,
    world: World,
) -> TrainingData:
    return TrainingData(
        images.train,
        [method.views(stage.image_size) for stage in timeline.stages],
        Order(seed=recipe.seed, labels=images.train.labels, timeline=timeline, drop_last=recipe.data.drop_last),
        facts=images.facts,
        seed=recipe.seed,
        device=numerics.device,
        quarantine=Quarantine(directory.quarantine, total=len(images.train), limit=recipe.data.max_unreadable),
        workers=_count_workers(recipe.data),
        prefetch=recipe.data.prefetch,
        resident=recipe.data.resident,
        channels_last=numerics.channels_last,
        rank=world.rank,
        world=world.size,
    )


def _step_plan(
    recipe: Recipe, timeline: Timeline, method: Method, freezer: LayerFreezer, numerics: Numerics, world: World
) -> StepPlan:
    ema = recipe.ema or EmaConfig()
    return StepPlan(
        forward=torch.compile(method) if recipe.compile else method,
        clock=timeline.clock,
        set_pace=pace_setter(recipe.optim, method),
        set_layers=freezer,
        ema_decay=partial(ema_decay, decay=ema.decay, warmup=ema.warmup),
        autocast=precision.autocast(numerics.device, numerics.precision),
        seed=recipe.seed,
        accumulate=recipe.accumulate,
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


def _count_workers(wanted: DataConfig) -> int:
    if wanted.workers == "auto":
        return min(os.cpu_count() or 1, 8)
    return wanted.workers
