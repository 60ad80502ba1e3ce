"""Training with real trouble in it: images that make a loss leap, or lose its finiteness, for a while."""

from typing import Literal

from pydantic import Field

from opsin.methods.base import Batch, Clock, DataFacts, Losses, MethodConfig
from opsin.methods.supervised import Supervised, SupervisedConfig
from opsin.nn.backbone import ModelConfig


class PoisonedConfig(MethodConfig):
    """Supervised training in which some images are poison for a while."""

    name: Literal["poisoned"] = "poisoned"
    images: tuple[int, ...] = (3, 500, 900)
    """Which."""
    steps: tuple[int, int] = (30, 45)
    """From and to which step."""
    factor: float = Field(1e4, allow_inf_nan=True)
    """What they multiply the loss of their batch by."""

    def build(self, model: ModelConfig, facts: DataFacts) -> "Poisoned":
        return Poisoned(self, model, facts)


class Poisoned(Supervised):
    """Multiplies the loss of a batch with poisonous images."""

    def __init__(self, config: PoisonedConfig, model: ModelConfig, facts: DataFacts) -> None:
        super().__init__(SupervisedConfig(), model, facts)
        self.poison = config

    def forward(self, batch: Batch, clock: Clock) -> Losses:
        losses = super().forward(batch, clock)
        first, last = self.poison.steps
        if not first <= clock.step < last:
            return losses
        is_hit = (batch.ids[:, None] == batch.ids.new_tensor(self.poison.images)).any()
        return Losses(losses.total * (1 + is_hit * (self.poison.factor - 1)), measures=losses.measures)
