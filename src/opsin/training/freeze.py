"""The layers that learn in a stage, by patterns of parameter names.

A frozen parameter gets no gradient, and its optimizer state stays as it is. A norm whose parameters are frozen keeps
its running statistics too. Networks that never learn (a teacher) stay as they are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase

from torch import nn

from opsin.clock.timeline import Clock, Timeline
from opsin.errors import ConfigError
from opsin.storage.teller import Teller


class LayerFreezer:
    """Sets which parameters of `method` learn; those that never learn by construction stay as they are."""

    def __init__(self, method: nn.Module) -> None:
        self._method = method
        self.learnable = tuple(name for name, param in method.named_parameters() if param.requires_grad)
        self._networks = {name.partition(".")[0] for name in self.learnable}
        self._current: tuple[str, ...] | None = None

    def __call__(self, clock: Clock) -> None:
        """Apply the patterns of the stage of `clock`; within a stage this costs nothing."""
        if clock.stage.train != self._current:
            self.set_trainable(clock.stage.train)

    def forget(self) -> None:
        """Apply the patterns again at the next step, because other code has changed which parameters learn."""
        self._current = None

    def set_trainable(self, patterns: tuple[str, ...]) -> None:
        """Let parameters learn if one of `patterns` (`head.*`) matches their name; freeze the others."""
        learning = set(matches(self.learnable, patterns))
        for name, param in self._method.named_parameters():
            if name in self.learnable:
                param.requires_grad = name in learning
                if name not in learning:
                    param.grad = None
        for name, module in self._method.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and name.partition(".")[0] in self._networks:
                learns = any(f"{name}.{own}" in learning for own, _ in module.named_parameters())
                module.train(learns or bool(matches([f"{name}.running_mean"], patterns)))
        self._current = patterns

    def frozen(self, patterns: Sequence[str]) -> list[str]:
        """The names of the parameters that `patterns` freeze."""
        learning = set(matches(self.learnable, patterns))
        return [name for name in self.learnable if name not in learning]

    def check(self, patterns: Sequence[str], *, key: str) -> None:
        """Check that each pattern matches a parameter; `key` is the name of the list in the recipe.

        Raises:
            ConfigError: a pattern matches no parameter that can learn, or there is none.
        """
        if not patterns:
            raise ConfigError(f"{key}: no pattern, so that nothing would learn; ['*'] lets all layers learn")
        for pattern in patterns:
            if not matches(self.learnable, [pattern]):
                raise ConfigError(
                    f"{key}: {pattern!r} matches no parameter; names begin with {_beginnings(self.learnable)}"
                )


def matches(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match one of the patterns: `*` stands for any letters, dots included, `[12]` for one of these."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _beginnings(names: Sequence[str]) -> str:
    """The first levels of the names, for a reader: `backbone.blocks.0`, `head.linear`."""
    found = dict.fromkeys(".".join(name.split(".")[:-1][:3]) or name for name in names)
    shown = list(found)
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-3:]])


def announce_stage(timeline: Timeline, freezer: LayerFreezer, teller: Teller, number: int, step: int) -> None:
    """Record that a stage begins; report it to people if there are several, or if layers are frozen."""
    stage = timeline.stages[number]
    frozen = freezer.frozen(stage.train)
    facts = {name: value for name, value in asdict(stage).items() if name != "name"}
    teller.tell("stage", step, number=number, name=stage.name, **{**facts, "train": list(stage.train)}, frozen=frozen)
    if len(timeline.stages) == 1 and not frozen:
        return
    words = [f"{stage.passes:.3g} epochs", f"{stage.image_size} px", f"batches of {stage.batch_size}"]
    if stage.data_fraction < 1:
        words.append(f"{stage.data_fraction:.0%} of the images")
    if stage.lr_scale != 1:
        words.append(f"learning rate x {stage.lr_scale:g}")
    if frozen:
        words.append(f"{len(frozen)} of {len(freezer.learnable)} tensors frozen (events.jsonl names them)")
    teller.notice(f"stage {number + 1} of {len(timeline.stages)}, {stage.name!r}: {', '.join(words)}")
