"""Training with less memory, and the fallback when memory runs out; the update stays the same.

After memory ran out, batches are computed in more parts than requested, from that step to the end of the run. The
number of parts decides how sums are rounded and which dropout is drawn. So it belongs to the run: `splits.json` names
the steps, and a resume, also on a larger machine, uses the same parts.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import nn

from opsin.errors import ConfigError
from opsin.methods.base import Method
from opsin.settings.family import Settings
from opsin.storage.files import reason_of
from opsin.storage.records import RecordFormat
from opsin.storage.teller import Silence, Teller

Policy = Literal["split", "always", "stop"]
"""`split` requires that the update stays the same; `always` lets batch norm see smaller parts."""


class MemoryConfig(Settings):
    """Computation in pieces, or twice, to save memory."""

    fit: Literal["auto", "off"] = "auto"
    """Foresight before the first step: `auto` sets `accumulate` and the next two keys so that the run fits into the
    memory it may hold, `off` tries it as it is."""
    checkpoint_blocks: bool = False
    """Keep only the input of each block, and compute the block again in the backward pass (Chen et al. 2016)."""
    view_chunk: int | None = Field(None, gt=0)
    """Views of an image that are computed at a time, by methods with several views; null for all."""
    on_out_of_memory: Policy = "split"
    """Consequence of too little memory: `split` doubles `accumulate` and continues, unless batch norm would see smaller
    parts; `always` accepts that; `stop` ends the run."""

    def saves_as_much_as(self, other: "MemoryConfig") -> bool:
        """True if these settings need as little memory as `other`, or less."""
        views = (self.view_chunk or math.inf) <= (other.view_chunk or math.inf)
        return views and self.checkpoint_blocks >= other.checkpoint_blocks


def save_memory(config: MemoryConfig, method: Method) -> None:
    """Set up `method` to save memory.

    Raises:
        ConfigError: the method has no pieces, or its network has no blocks.
    """
    if config.view_chunk is not None and type(method).chunks is Method.chunks:
        raise ConfigError(
            f"memory.view_chunk={config.view_chunk}: this method has one view of an image; leave it out, and use "
            "accumulate for less memory"
        )
    if config.checkpoint_blocks and not method.checkpoint_blocks():
        raise ConfigError(
            "memory.checkpoint_blocks=true: this network has no blocks to compute twice; leave it out, and use "
            "accumulate for less memory"
        )


@dataclass(frozen=True, slots=True)
class Fallback:
    """`factor` times the requested number of parts, from the update after `step` on."""

    step: int
    factor: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """The content of `splits.json`."""

    asked: str
    splits: tuple[Fallback, ...]


_FILE = RecordFormat(_Stored)


class PartFallback:
    """The fallbacks of a run. `file` keeps them; without one, parts never become smaller.

    `asked` names the batches of the recipe: fallbacks that were found with others do not count.
    """

    def __init__(self, file: Path | None = None, *, asked: str = "", teller: Teller | None = None) -> None:
        """Read the fallbacks of earlier sessions.

        Raises:
            RunError: the file is damaged.
        """
        self._file = file
        self._asked = asked
        self._teller = teller or Silence()
        self.found = () if file is None else _read(file, asked)
        """All fallbacks, by step; none if memory always sufficed."""
        self._unwritten = False

    def factor(self, step: int) -> int:
        """Factor on the requested number of parts, for the update after `step`."""
        if self._unwritten:
            self._write(step)
        return max((one.factor for one in self.found if one.step <= step), default=1)

    def double(self, step: int, *, parts: int, images: int) -> bool:
        """Halve the parts from `step` on, after `parts` of `images` were too large; False if that is impossible."""
        if self._file is None or parts >= images:
            return False
        factor = 2 * self.factor(step)
        # Fallbacks of later steps are from before a rollback, but there is hardly more memory the next time.
        later = [one for one in self.found if one.step > step and one.factor > factor]
        self.found = (*(one for one in self.found if one.step < step), Fallback(step, factor), *later)
        self._write(step)
        largest, smaller = -(-images // parts), -(-images // (2 * parts))
        text = (
            f"step {step + 1}: out of memory with {largest} images at a time: from here on it is {smaller} at a time "
            f"(accumulate {parts} -> {2 * parts}); the update stays the same"
        )
        self._teller.tell("out_of_memory", step, warn=text, accumulate=2 * parts, images_at_once=smaller, warning=text)
        return True

    def take_back(self, before: tuple[Fallback, ...], step: int) -> None:
        """Restore the fallbacks of `before` the update after `step`; the newer ones did not help."""
        if self.found == before:
            return
        self.found = before
        self._write(step)
        text = f"step {step + 1}: out of memory with one image at a time: the smaller parts of this step are taken back"
        self._teller.tell("out_of_memory", step, warn=text, images_at_once=1, warning=text)

    def _write(self, step: int) -> None:
        # Before the update that needs it: a resume after a kill repeats the update as it was.
        assert self._file is not None
        try:
            _FILE.write(self._file, _Stored(self._asked, self.found))
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:
                fault = f"{self._file.name} cannot be written: {reason_of(error)}"
                text = f"{fault}; each step tries again, and a resume before that may round differently"
                self._teller.tell("splits_unwritten", step, warn=text, warning=text)
            self._unwritten = True


def uses_batch_statistics(network: nn.Module) -> bool:
    """True if outputs for an image depend on the others of its part, as with batch norm."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())


def _read(file: Path, asked: str) -> tuple[Fallback, ...]:
    advice = (
        "it has the number of parts in which batches were computed after memory ran out: restore a copy, or delete it "
        "to go on with other rounding"
    )
    try:
        stored = _FILE.read(file, advice)
    except FileNotFoundError:
        return ()
    return stored.splits if stored.asked == asked else ()
