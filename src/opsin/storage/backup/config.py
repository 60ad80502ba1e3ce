"""The settings of a backup. No secret leaves the process, neither in the address of a recipe nor in a message."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from opsin.settings.family import Settings

SCHEMES = ("s3", "gs", "az")
"""Kinds of object stores, as an address begins: servers that speak S3, Google Cloud Storage, Azure."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_USER = re.compile(r"(?<=://)[^/@]*:[^@]*$")  # in an address without an end
_HIDDEN = "***"
_SECRET_NAMES = re.compile(r"(?i)KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|SIGNATURE|SAS|CONNECTION_STRING")
_SECRET_FORMS = (
    re.compile(r"(?<=://)\S+(?=@)"),  # user:password@, where the password may hold a slash
    re.compile(r"(?<=[?&])[^\s<>\"']+"),  # all that follows a question mark in an address
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}\b"),  # names of AWS keys
    re.compile(r"(?<=Bearer )\S+"),
)
_SHORTEST = 8  # a shorter value is a switch or a number; to hide it would hide words


def is_address(text: str) -> bool:
    """True if `text` has the form of an address (`scheme://...`), not of a path."""
    return _ADDRESS.match(text) is not None


def check_path(text: str) -> str:
    """Return `text`, a path or the address of a folder in a bucket, without a slash at its end.

    Raises:
        ValueError: another scheme, no bucket, or a secret in the address; the message hides it.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        if not text.strip():
            raise ValueError("an empty path does not fit; must be a folder, or an address like s3://BUCKET/FOLDER")
        return text
    if has_secret(text):
        shown = _USER.sub(_HIDDEN, masked(text))
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


def has_secret(url: str) -> bool:
    """True if an address holds a user, a password or a query; these belong in the environment alone."""
    # Not by the parts of a URL: a secret with a slash would end the first of them.
    bucket = url.partition("://")[2].partition("/")[0]
    return ":" in bucket or any(sign in url for sign in "@?#")


def masked(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return `text` with stars for every secret of the environment, and for everything that looks like a secret."""
    environment = os.environ if environment is None else environment
    secrets = {value for name, value in environment.items() if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST}
    # The longest first: one may be the beginning of another.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    for form in _SECRET_FORMS:
        text = form.sub(_HIDDEN, text)
    return text


StorePath = Annotated[str, AfterValidator(check_path)]
"""A recipe key of this type holds a path, or an address without credentials."""


class BackupConfig(Settings):
    """A store that the run is copied to while it trains."""

    path: StorePath
    """A folder, or an address like `s3://BUCKET/FOLDER` (also gs, az); credentials come from the environment alone."""
    keep: Literal["same", "all"] = "same"
    """Checkpoints that stay in the backup: the `same` that the run keeps, or `all` that it ever wrote."""
    minutes: float = Field(5, gt=0)
    """Logs and plots are copied with every checkpoint, and at least this often."""
    max_mib_per_s: float | None = Field(None, gt=0)
    """Bandwidth to use at most, in MiB per second; null for no limit."""
    wait: float = Field(60, ge=0)
    """Seconds to wait at the end of a session for missing copies; `opsin backup DIR` completes the backup later."""
    leave_out: tuple[str, ...] = ()
    """Patterns of files that are not copied (`tensorboard/*`); the recipe and the checkpoints always are."""
