"""The recipe: everything a run is asked to do, as frozen values."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from opsin.data.config import DataConfig, DataDraft
from opsin.errors import ConfigError
from opsin.evaluation.accuracy import AccuracyConfig
from opsin.evaluation.knn import KnnConfig
from opsin.evaluation.linear import LinearConfig
from opsin.evaluation.maps import MapsConfig
from opsin.methods.base import MethodConfig
from opsin.methods.dino import DinoConfig
from opsin.methods.hjepa import HJepaConfig
from opsin.methods.ijepa import IJepaConfig
from opsin.methods.supervised import SupervisedConfig
from opsin.monitors.collapse import CollapseConfig
from opsin.monitors.gradients import GradientsConfig
from opsin.monitors.histograms import HistogramsConfig
from opsin.monitors.loss import LossConfig
from opsin.monitors.memory import MemoryCreepConfig
from opsin.monitors.starvation import StarvationConfig
from opsin.monitors.throughput import ThroughputConfig
from opsin.nn.backbone import ModelConfig
from opsin.nn.ema import EmaConfig
from opsin.nn.models import MODELS
from opsin.reporting.webhook import AlertsConfig
from opsin.settings import layers
from opsin.settings.extensions import import_extensions
from opsin.settings.family import Settings
from opsin.settings.text import flatten
from opsin.storage.backup.config import BackupConfig
from opsin.training.checkpoints.retention import CheckpointConfig
from opsin.training.evaluator import EvaluatorConfig
from opsin.training.guard import GuardConfig
from opsin.training.memory import MemoryConfig
from opsin.training.monitor import MonitorConfig
from opsin.training.optim import SGD, AdamW, MuonConfig, OptimConfig
from opsin.training.profile.profile import ProfileConfig
from opsin.training.stages import StageConfig

T = TypeVar("T")

_KNOWN = (
    *MODELS,
    *(SupervisedConfig, DinoConfig, IJepaConfig, HJepaConfig),
    *(SGD, AdamW, MuonConfig),
    *(AccuracyConfig, KnnConfig, LinearConfig, MapsConfig),
    *(CollapseConfig, GradientsConfig, HistogramsConfig, LossConfig, MemoryCreepConfig),
    *(StarvationConfig, ThroughputConfig),
)
"""Members of families that a recipe can name; importing a file makes its members known."""

shipped = Path(__file__).parent.parent / "recipes"
"""The folder of the recipes that come with the package."""

_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"


def _check_device(text: str) -> str:
    if not re.fullmatch(_DEVICE, text):
        raise ValueError(f"{text!r} is not a device; must be auto, cpu, cuda or cuda:N")
    return text


class LimitsConfig(Settings):
    """Limits that end a run early."""

    hours: float | None = Field(None, gt=0)
    """Hours of wall-clock time of one session after which it stops with a checkpoint; null for no limit."""
    minutes: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Minutes of training for which keys that say `auto` are chosen; `auto` is 20 on a CPU and 60 on a GPU. A run whose
    keys are numbers does not depend on it."""
    steps: int | None = Field(None, gt=0)
    """Steps after which the run ends, with the schedules of the whole run; null for no limit."""
    cancelled_in_a_row: int = Field(20, gt=0)
    """Number of updates in a row without a finite loss and gradient that ends the run."""


class LogConfig(Settings):
    """The files of a run's log."""

    every: int = Field(50, gt=0)
    """Steps between two rows of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard files into the run directory."""
    csv: bool = True
    """Keep log.csv beside metrics.jsonl."""
    plots: bool = True
    """Draw curves into plots/ while training."""


class Draft(Settings):
    """The settings of a run, of which some may say `auto` until the run begins: see `opsin.run.choice`."""

    seed: int = Field(0, ge=0)
    """The seed of every random number of the run."""
    stages: list[StageConfig] = []
    """Parts of the run with settings of their own, one after the other; an empty list is a run without stages."""
    epochs: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(None, validate_default=True)
    """Passes over the training images; null takes the sum of the stages, a number stretches them to it, `auto` is what
    `limits.minutes` allows."""
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"]
    """Images per update, over all processes and parts; `auto` follows the number of images."""
    accumulate: int = Field(1, gt=0)
    """Number of parts in which a batch is computed, one after another, to save memory; the update stays the same."""
    device: Annotated[str, AfterValidator(_check_device)] = Field("auto", json_schema_extra={"pattern": _DEVICE})
    """Device of the training: `cpu`, `cuda` or `cuda:N`; `auto` takes a GPU if there is one."""
    threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Number of threads of the CPU that compute; `auto` is OMP_NUM_THREADS, or one for each core within the quota."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Number format of the forward pass; `auto` takes the fastest that this chip computes well."""
    attention: Literal["auto", "fused", "explicit"] = "auto"
    """Attention kernel; `auto` takes the faster one for the device."""
    channels_last: bool | Literal["auto"] = "auto"
    """Memory format of images and filters; `auto` is true for convolutional networks."""
    memory: MemoryConfig = MemoryConfig()
    """Ways to train with less memory, each at the price of some time."""
    compile: bool = False
    """Compile the networks for training (needs a C++ compiler on the CPU)."""
    deterministic: bool = True
    """Use deterministic kernels, so that two runs on one machine give the same bits."""
    data: DataDraft
    """The images, and their path to the device."""
    model: ModelConfig
    """The backbone; its name `auto` stands for the largest one that `limits.minutes` allows to train."""
    method: MethodConfig = SupervisedConfig()
    """The learning algorithm."""
    optim: OptimConfig = AdamW()
    """The optimizer."""
    ema: EmaConfig | None = None
    """A moving average of the weights, scored beside them; null for none."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """Times at which state is saved, and the checkpoints that are kept."""
    backup: BackupConfig | None = None
    """A second store to which the run is copied while it trains; null for none."""
    limits: LimitsConfig = LimitsConfig()
    """Limits that end a run early."""
    guard: GuardConfig = GuardConfig()
    """Effects of a rollback; monitors with the action `rollback` ask for one."""
    alerts: AlertsConfig = AlertsConfig()
    """Receivers of alerts and of the ends of runs."""
    log: LogConfig = LogConfig()
    """The files of the log."""
    profile: ProfileConfig = ProfileConfig()
    """A measurement of the parts of a few steps."""
    monitors: dict[str, MonitorConfig] = {
        "collapse": CollapseConfig(),
        "gradients": GradientsConfig(),
        "loss": LossConfig(),
        "throughput": ThroughputConfig(),
        "starvation": StarvationConfig(),
        "memory": MemoryCreepConfig(),
    }
    """Numbers of the training itself and verdicts on it, by name."""
    evaluators: dict[str, EvaluatorConfig] = {"val": AccuracyConfig()}
    """Scores on labelled images; the name is the prefix of the scores."""

    @field_validator("epochs", mode="after")
    @classmethod
    def _is_given_without_stages(cls, epochs: T, info: ValidationInfo) -> T:
        if epochs is None and info.data.get("stages") == []:
            raise ValueError("epochs is missing; give the passes over the images as epochs=VALUE, or stages")
        return epochs

    @property
    def open_keys(self) -> tuple[str, ...]:
        """The keys that say `auto` and are chosen before the run begins."""
        values = {
            "model.name": self.model.name,
            "data.image_size": self.data.image_size,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
        }
        return tuple(key for key, value in values.items() if value == "auto")


class Recipe(Draft):
    """The settings of a run; each is decided, or follows from the machine without an effect on the weights."""

    epochs: float | None = Field(None, gt=0, validate_default=True)
    """Passes over the training images; null takes the sum of the stages, a number stretches them to it."""
    batch_size: int = Field(gt=0)
    """Images per update, over all processes and parts."""
    data: DataConfig
    """The images, and their path to the device."""
    model: ModelConfig
    """The backbone."""


def read(reference: str, overrides: Sequence[str] = (), chosen: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a YAML path, with `key=value` overrides.

    `chosen` gives values for keys that say `auto`; what a layer above such a key gives wins.

    Raises:
        ConfigError: one line per fault, all faults at once; or a key says `auto` that `chosen` does not give.
    """
    draft = read_draft(reference, overrides, chosen)
    if draft.open_keys:
        keys = ", ".join(f"{key}=auto" for key in draft.open_keys)
        raise ConfigError(
            f"{reference}: {keys}: only opsin train and opsin plan choose these; write a recipe with numbers by "
            f"opsin plan {reference} --write FILE, and use that here"
        )
    return layers.read(reference, overrides, Recipe, shipped=shipped, chosen=chosen)


def read_draft(reference: str, overrides: Sequence[str] = (), chosen: Sequence[str] = ()) -> Draft:
    """As `read`; keys may say `auto`.

    Raises:
        ConfigError: one line per fault, all faults at once.
    """
    import_extensions()
    return layers.read(reference, overrides, Draft, shipped=shipped, chosen=chosen)


def fingerprint(recipe: Recipe) -> str:
    """A short hash of all keys; two recipes with the same one train the same weights."""
    values = json.dumps(flatten(recipe), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:16]
