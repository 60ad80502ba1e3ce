"""The beginning of a run: its first state, and its files once it is clear where it goes on from."""

from dataclasses import dataclass

from opsin.data.loading import TrainingData
from opsin.export.encoder import CARD_FILE, EncoderCard, describe_encoder, write_card
from opsin.nn.ema import ModelEma
from opsin.nn.heads import Classifier
from opsin.nn.weights import initialise
from opsin.reporting.teller import RunTeller
from opsin.run.parts import Parts, build_method
from opsin.run.recipe import fingerprint
from opsin.settings.text import to_yaml
from opsin.storage.directory import RunDirectory
from opsin.storage.files import write_atomic, writing
from opsin.storage.teller import Silence, Teller
from opsin.training.checkpoints.format import find_checkpoints
from opsin.training.optim import build_optimizer
from opsin.training.state import LossScale, TrainState


@dataclass(frozen=True, slots=True)
class RunStart:
    """The `Start` of a run from its parts."""

    parts: Parts
    data: TrainingData
    directory: RunDirectory
    teller: RunTeller
    card: EncoderCard
    last_step: int

    def fresh(self) -> TrainState:
        """The state before step 0, or one whose weights a checkpoint will replace."""
        return self._state(self.teller, resuming=bool(find_checkpoints(self.directory.checkpoints)))

    def over(self, state: TrainState) -> None:
        """Take a state back to what it was before step 0: the same bits, since all follows from the seed."""
        method = build_method(self.parts.recipe, self.parts.images.facts)
        for param, begun in zip(state.method.parameters(), method.parameters(), strict=True):
            param.requires_grad_(begun.requires_grad)  # a stage may have frozen it
        state.method.load_state_dict(method.state_dict())
        fresh = self._state(Silence(), resuming=False)
        state.optimizer, state.loss_scale, state.ema = fresh.optimizer, fresh.loss_scale, fresh.ema
        self.parts.freezer.forget()

    def commit(self, step: int) -> None:
        """Forget what the run did after `step`, and write the recipe that it follows from there on."""
        directory = self.directory
        self.teller.journal.rewind(step)
        with writing(directory.path, "make room, or choose another --out"):
            write_atomic(directory.recipe, to_yaml(self.parts.recipe, comments=False).encode())
            write_card(directory.path / CARD_FILE, self.card)
            if step < self.last_step:
                # The weights of an earlier end: readers of the run would take them for the newest.
                directory.model.unlink(missing_ok=True)
                directory.averaged.unlink(missing_ok=True)

    def _state(self, teller: Teller, *, resuming: bool) -> TrainState:
        recipe, method = self.parts.recipe, self.parts.method
        self.data.load()
        if not resuming:
            report = initialise(method.backbone, recipe.model)
            for line in report.lines() if report is not None else ():
                teller.notice(line)
            method.prepare(lambda: next(iter(self.data.batches(0, 1))))
        method.train()
        numerics = self.parts.numerics
        scale = LossScale.start(numerics.device) if numerics.precision == "fp16" else None
        ema = None if recipe.ema is None else ModelEma(method)
        return TrainState(method, build_optimizer(recipe.optim, method), scale, ema)


def card_of(parts: Parts) -> EncoderCard:
    """The facts that `opsin.load` needs beside the weights, so that a run can be used without its images."""
    recipe, method = parts.recipe, parts.method
    head = getattr(method, "head", None)
    return describe_encoder(
        method.backbone,
        head=head if isinstance(head, Classifier) else None,
        model=recipe.model,
        facts=parts.images.facts,
        resize=recipe.data.eval_resize or recipe.data.image_size,
        method=recipe.method.name,
        recipe=fingerprint(recipe),
    )
