"""Alerts and ends of runs, sent as JSON by POST to a URL that the recipe or the environment names.

A thread sends them, so that a slow, broken or silent server costs training nothing. Messages that it does not take
wait, up to a bound, and are sent again after growing pauses; the end of a run waits a moment for the last.

The URL is a secret wherever it is more than a host: it is shown as `https://host/...` only.
"""

import json
import os
import re
import threading
import urllib.error
import urllib.request
from base64 import b64encode
from collections import deque
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator

from opsin.errors import ConfigError
from opsin.reporting.journal import Event, Sink
from opsin.settings.family import Settings
from opsin.storage.teller import Fact, Teller

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
    """The URL of the recipe's key `alerts.webhook`: the key itself, or for `env:NAME` the value of the variable.

    Raises:
        ConfigError: the variable is not set, or holds no URL; the message does not show a secret.
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
    """Return a setting that may be written into `recipe.yaml`.

    Raises:
        ValueError: it is neither a URL nor `env:NAME`, or may hold a secret.
    """
    way_out = "put the URL into an environment variable and write env:NAME"
    if setting.startswith(_FROM_ENVIRONMENT):
        if not re.fullmatch(r"[A-Za-z_]\w*", setting.removeprefix(_FROM_ENVIRONMENT)):
            raise ValueError("the text after env: is not the name of an environment variable; write env:NAME")
        return setting
    if fault := url_fault(setting):
        raise ValueError(f"the text {fault}; {way_out}")
    parts = urlsplit(setting)
    is_plain = _PLAIN_PATH.fullmatch(parts.path) and not any(sign in setting for sign in "?#@")
    if not is_plain or any(map(_TOKEN.fullmatch, re.split(r"[/.~]", parts.path))):
        raise ValueError(f"{masked(setting)} seems to hold a token, and recipes are copied; {way_out}")
    return setting


class AlertsConfig(Settings):
    """Receivers of alerts, rollbacks and ends of runs, besides the console and the logs."""

    webhook: Annotated[str, AfterValidator(check_setting)] | None = None
    """A URL that gets each message as JSON by POST; `env:NAME` reads a secret one from an environment variable."""


def url_fault(url: str) -> str | None:
    """The reason why `url` cannot be posted to, without its text; None if it can."""
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_fits or re.search(r"\s|[^!-~]", url):
        return "is not an http:// or https:// URL"
    return None


def masked(url: str) -> str:
    """A URL as it may be shown."""
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
    """The longest time that `close` waits."""


class Webhook(Sink):
    """A sink that sends events to a server. The newest `bound` messages wait until it takes them."""

    name = "webhook"

    def __init__(
        self,
        folder: Path,
        teller: Teller,
        url: str,
        *,
        recipe: str = "",
        patience: Patience = Patience(),  # frozen
        bound: int = 100,
    ) -> None:
        super().__init__(folder, teller)
        self._recipe = recipe
        self._url = url
        self._patience = patience
        self._waiting: deque[bytes] = deque(maxlen=bound)
        self._unsent = 0
        """Messages that were not taken: those that wait, and those that are lost."""
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def event(self, event: Event) -> None:
        """Queue the event if its kind is in KINDS."""
        if event.kind not in KINDS:
            return
        with self._changed:
            self._waiting.append(_message(event, self.folder.resolve().name, self._recipe))
            self._unsent += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="webhook", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """Wait a moment for messages that are not sent yet; then they are lost, with a warning."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting, timeout=self._patience.end_s)
            self._waiting.clear()
            lost = self._unsent
        if lost:
            self.teller.warning(f"webhook: {lost} messages could not be sent to {masked(self._url)} and are lost")

    def abandon(self) -> None:
        self.close()

    def _send_all(self) -> None:
        pause_s, has_warned = self._patience.first_pause_s, False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting:
                    return
                message, was_closing = self._waiting[0], self._is_closing
            fault = _post(self._url, message, timeout_s=self._patience.answer_s)
            if fault is not None and not has_warned and self._waiting:
                has_warned = True
                self.teller.warning(
                    f"webhook: {masked(self._url)} {fault}; training goes on, messages wait and are tried again"
                )
            with self._changed:
                if fault is None or fault.startswith(_GIVEN_UP):
                    self._unsent -= fault is None
                    # Meanwhile newer ones may have pushed it out.
                    if self._waiting and self._waiting[0] is message:
                        self._waiting.popleft()
                    self._changed.notify_all()
                    pause_s = self._patience.first_pause_s
                else:
                    pause_s = self._pause(pause_s, was_closing=was_closing)

    def _pause(self, pause_s: float, *, was_closing: bool) -> float:
        """Wait before the next try; return the pause after it."""
        if self._changed.wait_for(lambda: self._is_closing and not was_closing, timeout=pause_s):
            return self._patience.first_pause_s  # the end of the run is worth another try at once
        return min(2 * pause_s, self._patience.longest_pause_s)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without the message."""

    def redirect_request(self, *arguments: object) -> None:
        return None


def _post(url: str, message: bytes, *, timeout_s: float) -> str | None:
    """Send a message; return the reason if the server did not take it, without the URL."""
    address, credentials = _apart(url)
    headers = {"Content-Type": "application/json", "User-Agent": "opsin", **credentials}
    request = urllib.request.Request(address, message, headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s):
            return None
    except urllib.error.HTTPError as error:
        with error:
            is_transient = error.code in (408, 425, 429) or error.code >= 500
            return f"answers {error.code}" if is_transient else f"{_GIVEN_UP} a message with {error.code}"
    except urllib.error.URLError as error:
        reason = error.reason
        words = reason.strerror or type(reason).__name__ if isinstance(reason, OSError) else "no connection"
        return f"cannot be reached ({words})"
    except TimeoutError:
        return f"does not answer within {timeout_s:g} s"
    except (OSError, HTTPException, ValueError) as error:
        return f"cannot be reached ({type(error).__name__})"


def _apart(url: str) -> tuple[str, dict[str, str]]:
    """Split a URL into the URL without user and password, and the header that holds these."""
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
        # Chat services show this.
        "text": f"opsin {run}: {event.kind}" + (f": {said}" if said else f" after step {event.step}"),
    }
    return json.dumps(facts).encode()
