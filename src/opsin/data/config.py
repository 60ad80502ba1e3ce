"""Which images a run takes, and how they reach the device."""

from typing import Literal

from pydantic import Field

from opsin.settings.family import Settings


class DataConfig(Settings):
    """Which images, and how they reach the device."""

    path: str
    """A folder, a CSV or parquet file, or the words `digits` or `cifar10`. Relative to the working directory."""
    kind: Literal["auto", "digits", "cifar10", "folder", "csv", "parquet"] = "auto"
    """What `path` is; `auto` finds out and says so."""
    labels: Literal["auto", "folders", "none"] = "auto"
    """Whether the folders under `path` are classes."""
    image_column: str | None = None
    """The parquet column that holds the images, where it is not the only candidate."""
    label_column: str | None = None
    """The parquet column that holds the labels, where it is not the only candidate."""
    cache: str = "~/.cache/opsin"
    """Where downloads are kept."""
    image_size: int = Field(gt=0)
    """Side of the training images in pixels."""
    eval_resize: int | None = Field(None, gt=0)
    """Shorter side before the centre crop when evaluating; null takes image_size."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the training images kept for validation, where the data has no split of its own."""
    drop_last: bool = True
    """Leave out the images after the last full batch of an epoch; false makes that batch short."""
    workers: int | Literal["auto"] = Field("auto")
    """Processes that decode images; `auto` is one per core, up to 8. 0 decodes in the training process."""
    prefetch: int = Field(4, ge=1)
    """Batches that each worker prepares ahead."""
    resident: bool | Literal["auto"] = "auto"
    """Keep all images decoded in memory (on the GPU if there is one); `auto` does so where they are small."""
    max_unreadable: float = Field(0.01, ge=0, le=1)
    """Share of images that may fail to decode before the run stops."""
    mean: tuple[float, float, float] | None = None
    """Mean of each channel, 0 to 1; null takes the data set's own where it is known, else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of each channel, 0 to 1; null as for `mean`."""
