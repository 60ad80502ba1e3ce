"""Alerts and ends of runs, sent as JSON by POST to a URL that the recipe or the environment names.

A thread sends them, so that a server that is slow, down or silent costs training nothing. What cannot be sent waits,
up to a bound, and is tried again with growing pauses; the end of a run waits a moment for the last.

The URL is a secret wherever it is more than a host: it is shown as `https://host/...` only.
"""

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator

from opsin.errors import ConfigError
from opsin.reporting.journal import Event, Row
from opsin.settings.family import Settings
from opsin.storage.teller import Fact

KINDS = (
    "alert",
    "rollback",
    "out_of_memory",
    "checkpoint_failed",
    "crash",
    "done",
    "stopped",
    "failed",
)
"""Events that are sent."""
_FROM_ENVIRONMENT = "env:"
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~-]*")
# Of 16 letters or more with a digit among them, or with large and small ones; or long.
_TOKEN = re.compile(r"(?=.*\d).{16,}|(?=.*[a-z])(?=.*[A-Z]).{16,}|.{32,}")
_GIVEN_UP = "refused"


def webhook_url(setting: str) -> str:
    """The URL that the recipe's key `alerts.webhook` means: itself, or the value of `env:NAME`.

    Raises:
        ConfigError: the variable is not set, or what is given is no URL; the message does not show a secret.
    """
    if not setting.startswith(_FROM_ENVIRONMENT):
        return setting
    name = setting.removeprefix(_FROM_ENVIRONMENT)
    url = os.environ.get(name, "")
    if fault := url_fault(url):
        state = fault if url else "is not set"
        raise ConfigError(
            f"alerts.webhook={setting}: the environment variable {name} {state}; export {name}=https://..."
        )
    return url


def check_setting(setting: str) -> str:
    """`setting` as it is, where it may stand in a recipe.

    Raises:
        ValueError: it is neither a URL nor `env:NAME`, or holds a secret, which would stand in `recipe.yaml`.
    """
    way_out = "put the URL into an environment variable and write env:NAME"
    if setting.startswith(_FROM_ENVIRONMENT):
        if not re.fullmatch(r"[A-Za-z_]\w*", setting.removeprefix(_FROM_ENVIRONMENT)):
            raise ValueError("what follows env: names no environment variable; write env:NAME")
        return setting
    if fault := url_fault(setting):
        raise ValueError(f"what is given {fault}; {way_out}")
    parts = urlsplit(setting)
    is_plain = _PLAIN_PATH.fullmatch(parts.path) and not any(sign in setting for sign in "?#@")
    if not is_plain or any(map(_TOKEN.fullmatch, re.split(r"[/.~]", parts.path))):
        raise ValueError(f"{masked(setting)} holds what looks like a token, and recipes are copied; {way_out}")
    return setting


class AlertsConfig(Settings):
    """Who is told of alerts, rollbacks and the end of a run, besides the console and the logs."""

    webhook: Annotated[str, AfterValidator(check_setting)] | None = None
    """A URL that gets them as JSON by POST; `env:NAME` takes it from an environment variable, where it is a secret."""


def url_fault(url: str) -> str | None:
    """Why `url` cannot be posted to, without its text; None where it can."""
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        return "is no URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_fits or re.search(r"\s|[^!-~]", url):
        return "is no http:// or https:// URL"
    return None


def masked(url: str) -> str:
    """What may be shown of a URL."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}/..."


@dataclass(frozen=True, slots=True)
class Patience:
    """Times in seconds."""

    answer_s: float = 10.0
    """For a connection, and for each part of an answer."""
    first_pause_s: float = 1.0
    """After a failure; doubled with each that follows."""
    longest_pause_s: float = 60.0
    end_s: float = 10.0
    """How long `close` waits at most."""


class Webhook:
    """A sink of the journal. The newest `bound` messages wait where the server does not take them."""

    name = "webhook"

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        recipe: str = "",
        warn: Callable[[str], None],
        patience: Patience = Patience(),  # frozen
        bound: int = 100,
    ) -> None:
        """`warn` is told once that the server does not answer; in the thread of the journal."""
        self._run = folder.resolve().name
        self._recipe = recipe
        self._url = url
        self._warn = warn
        self._patience = patience
        self._bound = bound
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._fault: str | None = None
        self._warned = False
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def write(self, row: Row) -> None:
        self._tell()

    def event(self, event: Event) -> None:
        """Send it, if it is of those that are sent."""
        self._tell()
        if event.kind not in KINDS:
            return
        with self._changed:
            if len(self._waiting) >= self._bound:
                self._waiting.popleft()
                self._lost += 1
            self._waiting.append(_message(event, self._run, self._recipe))
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="webhook", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def rewind(self, step: int) -> None:
        pass

    def catch_up(self, step: int) -> None:
        pass

    def close(self) -> None:
        """Wait a moment for what is not sent yet; then it is lost, with a warning."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting, timeout=self._patience.end_s)
            lost = len(self._waiting) + self._lost
            self._waiting.clear()
        self._tell()
        if lost:
            self._warn(f"webhook: {lost} messages could not be sent to {masked(self._url)} and are lost")

    def abandon(self) -> None:
        self.close()

    def _tell(self) -> None:
        with self._changed:
            fault = None if self._warned else self._fault
            self._warned = self._warned or fault is not None
        if fault is not None:
            self._warn(f"webhook: {masked(self._url)} {fault}; training goes on, messages wait and are tried again")

    def _send_all(self) -> None:
        pause_s = self._patience.first_pause_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                message = self._waiting[0]
            fault = _post(self._url, message, timeout_s=self._patience.answer_s)
            with self._changed:
                if fault is not None:
                    self._fault = fault
                if fault is None or fault.startswith(_GIVEN_UP):
                    self._lost += fault is not None
                    # Meanwhile the bound may have taken it.
                    if self._waiting and self._waiting[0] is message:
                        self._waiting.popleft()
                    self._changed.notify_all()
                    pause_s = self._patience.first_pause_s
                    continue
                end = time.monotonic() + pause_s
                # The end of the run is worth one more try at once, then the pauses begin anew.
                was_closing = self._closing
                while (left := end - time.monotonic()) > 0 and self._closing == was_closing:
                    self._changed.wait(left)
                pause_s = min(2 * pause_s, self._patience.longest_pause_s)
                if self._closing and not was_closing:
                    pause_s = self._patience.first_pause_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without the message."""

    def redirect_request(self, *arguments: object) -> None:
        return None


def _post(url: str, message: bytes, *, timeout_s: float) -> str | None:
    """Why the message was not taken; None where it was. Never shows the URL."""
    address, credentials = _apart(url)
    headers = {"Content-Type": "application/json", "User-Agent": "opsin", **credentials}
    request = urllib.request.Request(address, message, headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s):
            return None
    except urllib.error.HTTPError as error:
        with error:
            passing = error.code in (408, 425, 429) or error.code >= 500
            return f"answers {error.code}" if passing else f"{_GIVEN_UP} a message with {error.code}"
    except urllib.error.URLError as error:
        reason = error.reason
        words = reason.strerror or type(reason).__name__ if isinstance(reason, OSError) else "no connection"
        return f"cannot be reached ({words})"
    except TimeoutError:
        return f"does not answer within {timeout_s:g} s"
    except (OSError, HTTPException, ValueError) as error:
        return f"cannot be reached ({type(error).__name__})"


def _apart(url: str) -> tuple[str, dict[str, str]]:
    """The URL without the user and the password that stand before its host, and the header that they belong in."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    name, _, password = user.partition(":")
    token = b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {token}"}


def _message(event: Event, run: str, recipe: str) -> bytes:
    said = event.facts.get("message") or event.facts.get("warning") or event.facts.get("reason") or ""
    facts: dict[str, Fact] = {
        "run": run,
        "recipe": recipe,
        "time": event.time,
        "step": event.step,
        "kind": event.kind,
        "message": str(said),
        # What chat services show.
        "text": f"opsin {run}: {event.kind}" + (f": {said}" if said else f" after step {event.step}"),
    }
    return json.dumps(facts).encode()
