"""One training step on random images: as a plain PyTorch script does it, and as opsin does it.

Shapes: B images of a batch, S side in pixels, K = 1000 classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.clock.timeline import Stage, Timeline
from opsin.data.base import Batch, DataFacts
from opsin.methods.supervised import SupervisedConfig
from opsin.nn.attention import choose_attention, set_attention
from opsin.nn.backbone import ModelConfig
from opsin.training import precision
from opsin.training.optim import AdamW, build_optimizer, schedule_setter
from opsin.training.state import LossScale, StepPlan, TrainState
from opsin.training.step import train_step

NUM_CLASSES = 1000


@dataclass(frozen=True, slots=True)
class Work:
    """What both do in a step."""

    batch: int
    size: int
    device: torch.device

    def images(self) -> Tensor:
        """Normal numbers [B, 3, S, S]."""
        return torch.randn(self.batch, 3, self.size, self.size, device=self.device)

    def labels(self) -> Tensor:
        """Random classes [B]."""
        return torch.randint(NUM_CLASSES, (self.batch,), device=self.device)


class Switches:
    """torch's process-wide settings at the time of making; `on` puts them back.

    Two ways of working in one process must each find the settings that they would have alone.
    """

    def __init__(self) -> None:
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self.cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
        self.tf32 = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        self.mkldnn = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]  # not in torch's stubs

    def on(self) -> None:
        """Put these settings back."""
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.cudnn
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.mkldnn.matmul.fp32_precision = self.mkldnn  # type: ignore[attr-defined]  # not in torch's stubs


def plain(network: nn.Module, work: Work) -> Callable[[], None]:
    """The step of a script: fp32, cross-entropy, `AdamW` as torch makes it, nothing asked."""
    switches = Switches()
    network = network.to(work.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    images, labels = work.images(), work.labels()

    def step() -> None:
        switches.on()
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def our_step(
    model: ModelConfig, work: Work, *, asked: str, channels_last: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """The step of `opsin train` for a supervised recipe."""
    before = Switches()
    ones = (1.0, 1.0, 1.0)
    facts = DataFacts(tuple(map(str, range(NUM_CLASSES))), 10_000, work.size, 3, ones, ones)
    method = SupervisedConfig().build(model, facts).to(work.device).train()
    precision.configure(work.device, asked, deterministic=True)
    switches = Switches()
    before.on()
    set_attention(method, choose_attention(work.device, asked)[0])
    if channels_last:
        method = method.to(memory_format=torch.channels_last)
    if compiled:
        method.compile_networks()
    optim = AdamW()
    state = TrainState(method, build_optimizer(optim, method))
    if asked == "fp16":
        state.loss_scale = LossScale.start(work.device)
    plan = StepPlan(
        forward=method,
        clock=Timeline([Stage(epochs=100, batch_size=work.batch, steps_per_epoch=1000)]).clock,
        set_schedule=schedule_setter(optim, method),
        autocast=precision.autocast(work.device, asked),
        seed=0,
    )
    images = work.images()
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    batch = Batch({"image": images[None]}, work.labels(), torch.arange(work.batch, device=work.device))

    def step() -> None:
        switches.on()
        train_step(state, batch, plan)

    return step
