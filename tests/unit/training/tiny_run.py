"""A run of a tiny method in plain PyTorch, and the checkpoints that it writes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.clock.timeline import Stage, Timeline
from opsin.methods.base import Batch, Clock, Losses, Method, ParamGroup, Views
from opsin.training.agenda import Agenda
from opsin.training.checkpoints.checkpoints import Checkpoints
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.checkpoints.retention import CheckpointConfig
from opsin.training.state import LossScale, TrainState
from tests.story import Record

TIMELINE = Timeline([Stage(epochs=10, batch_size=4, steps_per_epoch=5)])


class Tiny(Method):
    """Two layers with batch norm, on six numbers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 3))

    def views(self, image_size: int) -> Views:
        raise NotImplementedError

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        raise NotImplementedError

    def param_groups(self) -> Sequence[ParamGroup]:
        raise NotImplementedError


def fresh(kind: str = "adamw", *, width: int = 8, weight_decay: float = 0.05, scaled: bool = False) -> TrainState:
    method = Tiny(width)
    optimizer: torch.optim.Optimizer
    if kind == "adamw":
        optimizer = torch.optim.AdamW(method.parameters(), lr=0.01, weight_decay=weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9, weight_decay=weight_decay, fused=True)
    return TrainState(method, optimizer, LossScale.start(torch.device("cpu")) if scaled else None)


def train(state: TrainState, *, to: int) -> TrainState:
    while state.step < to:
        for group in state.optimizer.param_groups:
            group["lr"] = 0.01 * (1 - state.step / 50)
        generator = torch.Generator().manual_seed(state.step)
        images = torch.randn(4, 6, generator=generator)
        method = state.method
        assert isinstance(method, Tiny)
        F.cross_entropy(method.layers(images), torch.tensor([0, 1, 2, 0])).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        state.elapsed_s += 60.0
    return state


def bits(state: TrainState) -> list[Tensor]:
    tensors = list(state.method.state_dict().values())
    for moments in state.optimizer.state_dict()["state"].values():
        tensors += [moments[name] for name in sorted(moments)]
    return tensors


def equal(one: TrainState, other: TrainState) -> bool:
    pairs = zip(bits(one), bits(other), strict=True)
    return one.step == other.step and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


class Home:
    """A run directory, as checkpoints need it."""

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        self.path = self.checkpoints = folder
        self.check_held = check


class Taker:
    """A backup that hands on what it takes."""

    def __init__(self, take: Callable[[Path], None]) -> None:
        self.take = take


class Story:
    """The checkpoints of a run, and every event they told; written at once if nothing else is said."""

    def __init__(
        self,
        folder: Path,
        *,
        last_step: int | None = None,
        margin: int | None = None,
        on_written: Callable[[Path], None] = lambda path: None,
        check: Callable[[], None] = lambda: None,
        scores: Mapping[int, float] | None = None,
        **settings: object,
    ) -> None:
        self.folder = folder
        self.record = Record(scores)
        self.events = self.record.events
        config = CheckpointConfig.model_validate({"background": False, **settings})
        self.checkpoints = Checkpoints(
            Home(folder, check),
            config,
            Agenda(
                TIMELINE,
                TIMELINE.total_steps if last_step is None else last_step,
                checkpoints=config.every,
                milestones=config.milestones or "never",
                margin="1 step",
                delay=None if margin is None else margin - 1,
            ),
            self.record,
            Taker(on_written),
            fingerprint="f00d",
        )

    def restore(self, state: TrainState) -> TrainState:
        """The state with the newest valid checkpoint in it, as a run begins."""
        restored = self.checkpoints.restore(state)
        self.checkpoints.settle(restored, state.step)
        return state

    def warnings(self) -> list[str]:
        return self.record.warnings

    def steps(self) -> list[int]:
        return list(find_checkpoints(self.folder))


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)
