"""A folder in a bucket of S3, Google Cloud Storage or Azure, through obstore.

Credentials come from the environment (`AWS_ACCESS_KEY_ID`, `GOOGLE_APPLICATION_CREDENTIALS`,
`AZURE_STORAGE_ACCOUNT_KEY`, ...), for S3 also from the files that the tools of AWS share.
"""

import configparser
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import ObjectStore, from_url

from opsin.storage.backup.config import masked
from opsin.storage.backup.store import Absent, StoreError

_PART = 8 * 2**20
_MAX_PARTS = 9_000  # S3 allows 10,000
_PIECE = 2**17  # bytes of a chunk; when a line fails, only the last chunk is lost
_HASH = "sha256"  # the name of the hash among an object's attributes
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified container does not exist")
_DENIED = re.compile(r"status code: 40[13]\b")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
# Without keys the library asks the machine for those of its role, at this address in all clouds.
_MACHINE = re.compile(r"//169\.254\.169\.254/|/latest/api/token\b")
_NO_CREDENTIALS = (
    "no credentials: the environment has none (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, "
    "AZURE_STORAGE_ACCOUNT_KEY, ...), and this machine has no role that gives any"
)
# Short: the caller tries again for as long as needed, and can be stopped in between.
_RETRY: Mapping[str, Any] = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
_CONNECT = timedelta(seconds=5)
# The longest pause before and within an answer: a file may take any time as long as bytes arrive.
_SILENCE = timedelta(seconds=60)
# For a part or a small file that is sent without a sign of progress. The system notices a dead line sooner.
_SENDING = timedelta(minutes=10)
_FOR_EVER = timedelta(days=365)


class Bucket:
    """Objects below one prefix. Large files go in parts; each carries its sha256 as an attribute."""

    def __init__(self, url: str) -> None:
        """Take the folder at an address without credentials; no request goes to the server yet.

        Raises:
            StoreError: the settings of the environment do not fit together.
        """
        self.shown = url
        self.secrets = _shared_aws_settings(os.environ) if urlsplit(url).scheme == "s3" else {}
        """Settings whose values no message may show, beside those of the environment."""
        self._parts_at_once = 4  # and in memory
        try:
            # The limit on silence would count the time that a part is on its way out.
            self._store = self._open(read_timeout=_SILENCE, timeout=_FOR_EVER)
            self._sending = self._open(timeout=_SENDING)
        except (BaseError, ValueError) as error:
            raise StoreError(f"{url}: {self._reason(error)}", refused=True) from error

    def put(self, name: str, chunks: Iterator[bytes], *, size: int, sha256: str) -> None:
        with self._store_errors(name):
            if size <= _PART:
                obstore.put(self._sending, name, b"".join(chunks), attributes={_HASH: sha256}, use_multipart=False)
                return
            try:
                obstore.put(
                    self._sending,
                    name,
                    chunks,
                    attributes={_HASH: sha256},
                    use_multipart=True,
                    chunk_size=max(_PART, -(-size // _MAX_PARTS)),
                    max_concurrency=self._parts_at_once,
                )
            except BaseError as error:
                if "TimedOut" in str(error):  # on a slow line the parts go one by one from now on
                    self._parts_at_once = 1
                raise

    def holds(self, name: str, *, size: int, sha256: str) -> bool:
        with suppress(Absent), self._store_errors(name):
            found = obstore.get(self._store, name, options={"head": True})
            return found.meta["size"] == size and found.attributes.get(_HASH) == sha256
        return False

    def fetch(self, name: str, *, start: int = 0) -> Iterator[bytes]:
        with self._store_errors(name):
            try:
                found = obstore.get(self._store, name, options={"range": {"offset": start}} if start else None)
            except BaseError as error:
                if start and "status code: 416" in str(error):  # the file ends before that byte
                    return
                raise
            for chunk in found.stream(min_chunk_size=_PIECE):
                yield bytes(chunk)

    def names(self, folder: str = "") -> list[str]:
        with self._store_errors(folder):
            return sorted(item["path"] for page in obstore.list(self._store, folder or None) for item in page)

    def remove(self, name: str) -> None:
        with suppress(Absent), self._store_errors(name):
            obstore.delete(self._store, name)

    def clear(self) -> None:
        """Do nothing: parts of interrupted uploads are not listed; a rule of the bucket removes them."""

    def _open(self, **timeouts: timedelta) -> ObjectStore:
        options: dict[str, Any] = {"connect_timeout": _CONNECT, **timeouts}
        if any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS):
            options["allow_http"] = True
        settings = {"client_options": options, "retry_config": _RETRY, **self.secrets}
        return from_url(self.shown, **settings)  # type: ignore[call-overload, no-any-return]

    @contextmanager
    def _store_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, BaseError) as error:
            # Not chained: the full error of the library holds headers and the names of keys.
            said = str(error)
            if any(words in said for words in _NO_BUCKET):
                raise StoreError(f"{self.shown}: there is no such bucket", refused=True) from None
            if isinstance(error, FileNotFoundError):
                raise Absent(f"{self.shown}: holds no {name}", refused=True) from None
            if _MACHINE.search(said):
                raise StoreError(f"{self.shown}: {_NO_CREDENTIALS}", refused=True) from None
            refused = isinstance(error, PermissionDeniedError | UnauthenticatedError) or bool(_DENIED.search(said))
            raise StoreError(f"{self.shown}: {self._reason(error)}", refused=refused) from None

    def _reason(self, error: Exception) -> str:
        """Return the last part of the first line, with no more than the error code of the server's answer."""
        said = str(error)
        line = said.partition("\n")[0].partition("<")[0].rpartition(" - ")[2].strip().rstrip(":")
        if code := _CODE.search(said):
            line = f"{line} ({code[1]})"
        return masked(masked(line), {f"{name}_SECRET": value for name, value in self.secrets.items()})


def _shared_aws_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return keys and region of the profile in `~/.aws` where the environment has none."""
    found: dict[str, str] = {}
    profile = environment.get("AWS_PROFILE", "default")
    home = Path(environment.get("HOME", "~")).expanduser() / ".aws"
    if "AWS_ACCESS_KEY_ID" not in environment:
        section = _section(Path(environment.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials")), profile)
        names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
        found = {name: section[name] for name in names if name in section}
    if "AWS_REGION" not in environment and "AWS_DEFAULT_REGION" not in environment:
        heading = profile if profile == "default" else f"profile {profile}"
        section = _section(Path(environment.get("AWS_CONFIG_FILE", home / "config")), heading)
        if "region" in section:
            found["aws_region"] = section["region"]
    return found


def _section(path: Path, heading: str) -> Mapping[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path)
    except (configparser.Error, UnicodeDecodeError, OSError):
        return {}
    return parser[heading] if parser.has_section(heading) else {}
