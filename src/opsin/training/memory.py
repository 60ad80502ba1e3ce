"""Ways to train with less memory, and what happens where memory ends; the update stays the same.

Where memory ends, batches are computed in more parts than asked for, from that step on, and for good. In how many
parts a batch is computed decides how sums are rounded and which dropout is drawn. So it belongs to the run:
`splits.json` names the steps, and whoever takes them again, after a resume or on a larger machine, splits there too.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from opsin.errors import ConfigError, RunError
from opsin.methods.base import Method
from opsin.settings.family import Settings
from opsin.storage.files import write_atomic
from opsin.storage.teller import Silence, Teller

_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "_ALLOC_FAILED", "_ALLOCATION_FAILED")
"""What a plain RuntimeError says of it: torch's on the CPU; the driver's; cuBLAS's, cuDNN's and their kin's, which take
memory past torch."""
Policy = Literal["split", "always", "stop"]
"""`split` does so where the update stays the same, `always` also where batch norm sees smaller parts."""


class MemoryConfig(Settings):
    """What is computed in pieces or computed twice."""

    checkpoint_blocks: bool = False
    """Keep only what goes into each block, and compute the block once more in the backward pass (Chen et al. 2016)."""
    view_chunk: int | None = Field(None, gt=0)
    """Views of an image that go forward and backward at a time; null for all. For methods that see several."""
    on_out_of_memory: Policy = "split"
    """When memory ends: `split` doubles `accumulate` and goes on; `always` does so even where batch norm then sees
    smaller parts; `stop` ends the run."""


def save_memory(config: MemoryConfig, method: Method) -> None:
    """Set up `method` so.

    Raises:
        ConfigError: the method has no pieces, or its network no blocks.
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
    """From the update after `step` on, batches are in `factor` times as many parts as asked for."""

    step: int
    factor: int


class PartFallback:
    """The splits of a run. `file` keeps them; without one, nothing is ever split.

    `asked` names what the recipe wants of batches: splits that were found under other wishes do not count.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        asked: str = "",
        teller: Teller | None = None,
    ) -> None:
        """Read those that were found before.

        Raises:
            RunError: the file is damaged.
        """
        self._file = file
        self._asked = asked
        self._teller = teller or Silence()
        self._found = () if file is None else _read(file, asked)
        self._unwritten = False

    @property
    def found(self) -> tuple[Fallback, ...]:
        """All of them, by step; none where memory always sufficed."""
        return self._found

    def factor(self, step: int) -> int:
        """How many times more parts the update after `step` has."""
        if self._unwritten:
            self._write(step)
        return max((split.factor for split in self._found if split.step <= step), default=1)

    def double(self, step: int, *, parts: int, images: int) -> bool:
        """Halve the parts from here on, where `parts` of `images` were too large; False where that cannot be."""
        if self._file is None or parts >= images:
            return False
        factor = 2 * self.factor(step)
        # Those of later steps belong to a future that was given up, but memory will hardly be larger in the next.
        later = [split for split in self._found if split.step > step and split.factor > factor]
        self._found = (*(split for split in self._found if split.step < step), Fallback(step, factor), *later)
        self._write(step)
        largest, smaller = -(-images // parts), -(-images // (2 * parts))
        text = (
            f"step {step + 1}: out of memory with {largest} images at a time: from here on it is {smaller} at a time "
            f"(accumulate {parts} -> {2 * parts}); the update stays the same"
        )
        self._teller.tell("out_of_memory", step, warn=text, accumulate=2 * parts, images_at_once=smaller, warning=text)
        return True

    def take_back(self, before: tuple[Fallback, ...], step: int) -> None:
        """Go back to the splits of `before` the update after `step`, which none of the others has helped."""
        if self._found == before:
            return
        self._found = before
        self._write(step)
        text = f"step {step + 1}: out of memory with one image at a time: the splits of this step are taken back"
        self._teller.tell("out_of_memory", step, warn=text, images_at_once=1, warning=text)

    def _write(self, step: int) -> None:
        # Before the update that needs it: whatever kills the process, the update is repeated as it was.
        assert self._file is not None
        facts = {"asked": self._asked, "splits": [asdict(split) for split in self._found]}
        try:
            write_atomic(self._file, (json.dumps(facts) + "\n").encode())
            self._unwritten = False
        except OSError as error:
            if not self._unwritten:
                fault = f"{self._file.name} cannot be written: {error.strerror or error}"
                text = f"{fault}; it is tried again at each step, and a resume before that may round differently"
                self._teller.tell("splits_unwritten", step, warn=text, warning=text)
            self._unwritten = True


def uses_batch_statistics(network: nn.Module) -> bool:
    """Whether outputs for an image depend on the others of its part, as with batch norm."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` tells that there is no memory left, on the GPU or the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)
    )


def _read(file: Path, asked: str) -> tuple[Fallback, ...]:
    if not file.exists():
        return ()
    try:
        facts = json.loads(file.read_bytes())
        found = tuple(Fallback(int(item["step"]), int(item["factor"])) for item in facts["splits"])
        return found if facts["asked"] == asked else ()
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"{file}: is damaged ({error!r}); it holds in how many parts batches were computed after memory ran out: "
            "put back a copy, or delete it to go on with other rounding"
        ) from error
