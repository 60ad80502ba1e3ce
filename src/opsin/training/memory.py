"""Ways to train with less memory; the update stays the same."""

from pydantic import Field

from opsin.errors import ConfigError
from opsin.methods.base import Method
from opsin.settings.family import Settings
from opsin.training.splits import Policy


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
