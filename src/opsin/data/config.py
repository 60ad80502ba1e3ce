"""The settings of data: the images of a run, and their path to the device."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from opsin.data.sources.kinds import KINDS, check_kind
from opsin.settings.family import Settings


class DataDraft(Settings):
    """The images of a run, and their path to the device."""

    path: str
    """The images: a folder, a CSV or parquet file, or the word `digits` or `cifar10`."""
    kind: Annotated[str, AfterValidator(check_kind)] = Field("auto", json_schema_extra={"examples": ["auto", *KINDS]})
    """Kind of storage at `path`; `auto` finds it out and reports it."""
    labels: Literal["auto", "folders", "none"] = "auto"
    """Labels of a folder: `folders` takes subfolders as classes, `none` takes none, `auto` looks at the layout."""
    image_column: str | None = None
    """Column with the images: in parquet files null finds it, in CSV files null takes `path`."""
    label_column: str | None = None
    """Column with the labels: in parquet files null finds it, in CSV files null takes `label`."""
    cache: str = "~/.cache/opsin"
    """Folder for downloads and unpacked tables."""
    image_size: Annotated[int, Field(gt=0)] | Literal["auto"]
    """Side of the training images in pixels; `auto` is chosen with the network."""
    eval_resize: int | None = Field(None, gt=0)
    """Length of the shorter side in pixels before evaluation cuts out the centre; null takes image_size."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the training images that validates, if the data has no validation images of its own."""
    drop_last: bool = True
    """Skip the images after the last full batch of an epoch; false makes a short batch of them."""
    workers: int | Literal["auto"] = Field("auto")
    """Number of processes that decode images; `auto` is one for each core. 0 decodes in the training process."""
    prefetch: int = Field(4, ge=1)
    """Number of batches that each worker prepares ahead; if it is above 1, all of them take at most 1 GiB."""
    resident: bool | Literal["auto"] = "auto"
    """Keep all images decoded in memory, on the GPU if there is one; `auto` does so if they are small."""
    max_unreadable: float = Field(0.01, ge=0, le=1)
    """Share of the images that may be unreadable; the run stops when there are more."""
    mean: tuple[float, float, float] | None = None
    """Mean of each channel, 0 to 1; null takes the known values of `digits` and `cifar10`, else those of ImageNet."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of each channel, 0 to 1; null is chosen as for `mean`."""


class DataConfig(DataDraft):
    """As `DataDraft`, with a size."""

    image_size: int = Field(gt=0)
    """Side of the training images in pixels."""
