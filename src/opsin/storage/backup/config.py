"""What a recipe says about the second place of its run."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from opsin.settings.family import Settings
from opsin.storage.backup.secrecy import has_secret, masked

SCHEMES = ("s3", "gs", "az")
"""Kinds of object stores, as an address begins: S3 and what speaks like it, Google Cloud Storage, Azure."""

_USER = re.compile(r"(?<=://)[^/@]*:[^@]*$")  # in an address that nobody knows the end of
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def is_address(text: str) -> bool:
    """Whether `text` is the address of an object store, or wants to be, and not a path."""
    return _ADDRESS.match(text) is not None


def check_path(text: str) -> str:
    """`text`, a path or the address of a folder in a bucket, without a slash at its end.

    Raises:
        ValueError: another scheme, no bucket, or a secret in the address; the message hides it.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        if not text.strip():
            raise ValueError("an empty path does not fit; must be a folder, or an address like s3://BUCKET/FOLDER")
        return text
    if has_secret(text):
        shown = _USER.sub("***", masked(text))
        raise ValueError(
            f"{shown!r} holds credentials or a query; must be scheme, bucket and folder alone: "
            "keys belong in the environment (AWS_ACCESS_KEY_ID, ...), which no file of a run holds"
        )
    scheme, bucket = match[1], match[2].partition("/")[0]
    if scheme not in SCHEMES:
        raise ValueError(
            f"{text!r} does not fit; must begin with {', '.join(f'{s}://' for s in SCHEMES)} or be a folder"
        )
    if not bucket:
        raise ValueError(f"{text!r} does not fit; must name a bucket: {scheme}://BUCKET/FOLDER")
    return text.rstrip("/")


StorePath = Annotated[str, AfterValidator(check_path)]
"""A recipe key of this type holds a path, or an address without credentials."""


class BackupConfig(Settings):
    """A second place that the run is copied to while it trains."""

    path: StorePath
    """A folder, or an address: `s3://BUCKET/FOLDER`, `gs://...`, `az://...`. Credentials: the environment alone."""
    keep: Literal["same", "all"] = "same"
    """Which checkpoints stay there: the `same` that the run keeps, or `all` that it ever wrote."""
    minutes: float = Field(5, gt=0)
    """Logs and plots are copied with every checkpoint, and at least this often."""
    max_mib_per_s: float | None = Field(None, gt=0)
    """Bandwidth to use at most, in MiB per second; null for all there is."""
    wait: float = Field(60, ge=0)
    """Seconds to wait at the end of a session for what is not copied yet; `opsin backup DIR` finishes it later."""
    leave_out: tuple[str, ...] = ()
    """Patterns of files that are not copied (`tensorboard/*`); the recipe and the checkpoints always are."""
