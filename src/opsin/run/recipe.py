"""The recipe: everything a run is asked to do, as frozen values."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from opsin.data.config import DataConfig
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

_KNOWN = (
    *MODELS,
    *(SupervisedConfig, DinoConfig, IJepaConfig, HJepaConfig),
    *(SGD, AdamW, MuonConfig),
    *(AccuracyConfig, KnnConfig, LinearConfig, MapsConfig),
    *(CollapseConfig, GradientsConfig, HistogramsConfig, LossConfig, MemoryCreepConfig),
    *(StarvationConfig, ThroughputConfig),
)
"""What a recipe can name; a family knows each member once its file is imported."""

shipped = Path(__file__).parent.parent / "recipes"
"""The folder of the recipes that come with the package."""

_DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"


def _check_device(text: str) -> str:
    if not re.fullmatch(_DEVICE, text):
        raise ValueError(f"{text!r} is no device; must be auto, cpu, cuda or cuda:N")
    return text


class LimitsConfig(Settings):
    """When a run ends early."""

    hours: float | None = Field(None, gt=0)
    """Stop with a checkpoint after this much wall-clock time of one session; `opsin resume` goes on."""
    steps: int | None = Field(None, gt=0)
    """End the run after this many steps, without changing its schedules."""
    cancelled_in_a_row: int = Field(20, gt=0)
    """Updates with a non-finite loss or gradient, one after another, before the run fails."""


class LogConfig(Settings):
    """What is written while training."""

    every: int = Field(50, gt=0)
    """Steps between rows of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard files into the run directory."""
    csv: bool = True
    """Keep log.csv beside metrics.jsonl."""
    plots: bool = True
    """Draw curves into plots/ while training."""


class Recipe(Settings):
    """What a run is asked to do."""

    seed: int = Field(0, ge=0)
    """Every random number of the run follows from it."""
    stages: list[StageConfig] = []
    """Stretches of the run with settings of their own, one after the other; none is a run of one piece."""
    epochs: float | None = Field(None, gt=0, validate_default=True)
    """Passes over the training images; null takes the sum of the stages, a number stretches them to it."""
    batch_size: int = Field(gt=0)
    """Images per update, over all processes and parts."""
    accumulate: int = Field(1, gt=0)
    """Parts that a batch is computed in, one after another, to save memory; the update stays the same."""
    device: Annotated[str, AfterValidator(_check_device)] = Field("auto", json_schema_extra={"pattern": _DEVICE})
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Number format of the forward pass; `auto` takes the fastest that this chip computes well."""
    attention: Literal["auto", "fused", "explicit"] = "auto"
    """Attention kernel; `auto` takes the faster one for the device."""
    channels_last: bool | Literal["auto"] = "auto"
    """Memory format of images and filters; `auto` is true for convolutional networks."""
    memory: MemoryConfig = MemoryConfig()
    """Ways to train with less memory, each at the price of some time."""
    compile: bool = False
    """Compile the forward pass (needs a C++ compiler on the CPU)."""
    deterministic: bool = True
    """Use deterministic kernels, so that two runs on one machine give the same bits."""
    data: DataConfig
    """Which images, and how they reach the device."""
    model: ModelConfig
    """The backbone."""
    method: MethodConfig = SupervisedConfig()
    """What is learned from the images."""
    optim: OptimConfig = AdamW()
    """The optimizer."""
    ema: EmaConfig | None = None
    """A moving average of the weights, scored beside them; null for none."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """When state is saved, and what is kept."""
    backup: BackupConfig | None = None
    """A second place that the run is copied to while it trains; null for none."""
    limits: LimitsConfig = LimitsConfig()
    """When a run ends early."""
    guard: GuardConfig = GuardConfig()
    """What a rollback does; monitors whose action is `rollback` ask for one."""
    alerts: AlertsConfig = AlertsConfig()
    """Who is told of alerts and ends of runs."""
    log: LogConfig = LogConfig()
    """What is written while training."""
    profile: ProfileConfig = ProfileConfig()
    """A few steps taken apart: where their time goes."""
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
    def _is_given_without_stages(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        if epochs is None and info.data.get("stages") == []:
            raise ValueError("epochs is missing; give the passes over the images as epochs=VALUE, or stages")
        return epochs


def read(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a YAML path, with `key=value` overrides.

    Raises:
        ConfigError: one line per fault, all faults at once.
    """
    import_extensions()
    return layers.read(reference, overrides, Recipe, shipped=shipped)


def fingerprint(recipe: Recipe) -> str:
    """A short hash of all keys; two recipes with the same one train the same weights."""
    values = json.dumps(flatten(recipe), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:16]
