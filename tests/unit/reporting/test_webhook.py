"""Messages to a server: taken, taken late, or never, and training does not wait."""

import json
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opsin.errors import ConfigError
from opsin.reporting.journal import Journal
from opsin.reporting.webhook import Patience, Webhook, check_setting, masked, url_fault, webhook_url
from tests.story import Story

QUICK = Patience(answer_s=0.3, first_pause_s=0.02, longest_pause_s=0.05, end_s=5.0)


class Server:
    """A local HTTP server that gives these answers, the last one for ever; 0 is none at all."""

    def __init__(self, answers: Sequence[int], *, delay_s: float = 0.0) -> None:
        self.taken: list[dict[str, Any]] = []
        self.asked = 0
        self.authorizations: list[str | None] = []
        self.done = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = answers[min(server.asked, len(answers) - 1)]
                server.asked += 1
                server.authorizations.append(self.headers["Authorization"])
                server.done.wait(20 if status == 0 else delay_s)
                if status == 0:
                    return
                if status == 200:
                    server.taken.append(json.loads(body))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/hook"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.done.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    opened: list[Server] = []
    yield opened
    for server in opened:
        server.close()


def journal_with(folder: Path, url: str, story: Story, patience: Patience = QUICK, bound: int = 100) -> Journal:
    hook = Webhook(folder, story, url, recipe="tiny", patience=patience, bound=bound)
    return Journal(folder, [hook], teller=story)


def test_alerts_and_the_end_of_a_run_are_sent_and_nothing_else(tmp_path: Path, servers: list[Server]) -> None:
    servers.append(server := Server([200]))
    story = Story()
    journal = journal_with(tmp_path, server.url, story)
    journal.log(1, 0.1, {"train/loss": 1.0}, time_s=1.0)
    journal.event("checkpoint", 5)
    journal.event("alert", 7, monitor="collapse", message="features collapse")
    journal.event("done", 9, reason=None)
    journal.close()
    assert [(item["kind"], item["step"], item["recipe"]) for item in server.taken] == [
        ("alert", 7, "tiny"),
        ("done", 9, "tiny"),
    ]
    assert server.taken[0]["text"] == f"opsin {tmp_path.name}: alert: features collapse"
    assert not story.warnings


def test_what_a_server_refuses_for_a_while_is_sent_again_in_order(tmp_path: Path, servers: list[Server]) -> None:
    servers.append(server := Server([500, 503, 429, 200]))
    story = Story()
    journal = journal_with(tmp_path, server.url, story)
    journal.event("alert", 1, message="first")
    journal.event("alert", 2, message="second")
    journal.close()
    assert [item["message"] for item in server.taken] == ["first", "second"]
    assert len(story.warnings) == 1
    assert "answers" in story.warnings[0]


@pytest.mark.parametrize("answers", [[0], [500]], ids=["hangs", "is broken"])
def test_a_server_that_never_answers_costs_one_warning_and_a_bounded_end(
    tmp_path: Path, servers: list[Server], answers: list[int]
) -> None:
    servers.append(server := Server(answers))
    story = Story()
    journal = journal_with(tmp_path, server.url, story, Patience(0.2, 0.02, 0.05, end_s=0.5), bound=3)
    began = time.monotonic()
    for step in range(50):
        journal.event("alert", step, message="x")
        journal.log(step, 0.1, {"train/loss": 1.0}, time_s=1.0)
    assert time.monotonic() - began < 2
    while server.asked < 2:
        time.sleep(0.01)
    journal.log(60, 0.1, {"train/loss": 1.0}, time_s=1.0)
    began = time.monotonic()
    journal.close()
    assert time.monotonic() - began < 3
    assert len(story.warnings) == 2
    assert "50 messages could not be sent" in story.warnings[1]
    assert "/hook" not in "".join(story.warnings)


@pytest.mark.parametrize("answer", [404, 302])
def test_a_message_that_is_refused_for_good_is_not_sent_again(
    tmp_path: Path, servers: list[Server], answer: int
) -> None:
    servers.append(server := Server([answer, 200]))
    story = Story()
    journal = journal_with(tmp_path, server.url, story)
    journal.event("alert", 1, message="refused")
    journal.event("done", 2, reason=None)
    journal.close()
    assert [item["kind"] for item in server.taken] == ["done"]
    assert f"refused a message with {answer}" in story.warnings[0]


@pytest.mark.parametrize(("user", "sent"), [("me:p%40ss%3Aw@", "me:p@ss:w"), ("token@", "token:"), ("", None)])
def test_a_user_and_a_password_go_into_a_header_and_nowhere_else(
    tmp_path: Path, servers: list[Server], user: str, sent: str | None
) -> None:
    servers.append(server := Server([200, 404]))
    url = server.url.replace("//", f"//{user}")
    assert url_fault(url) is None
    story = Story()
    journal = journal_with(tmp_path, url, story)
    journal.event("alert", 1, message="taken")
    journal.event("done", 2, reason=None)
    journal.close()
    wanted = None if sent is None else f"Basic {b64encode(sent.encode()).decode()}"
    assert server.authorizations == [wanted] * 2
    assert [item["kind"] for item in server.taken] == ["alert"]
    shown = "".join(story.warnings) + (tmp_path / "events.jsonl").read_text()
    assert "refused a message with 404" in shown
    assert not any(secret in shown for secret in ("p%40ss", "p@ss", "token@"))


@pytest.mark.parametrize(("user", "path"), [("", "T0/secret"), ("me:secret@", "hook")])
def test_a_closed_port_is_named_without_the_secret(tmp_path: Path, user: str, path: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://{user}127.0.0.1:{taken.getsockname()[1]}/{path}"
    story = Story()
    journal = journal_with(tmp_path, url, story, Patience(0.2, 0.02, 0.05, end_s=0.3))
    journal.event("failed", 3, reason="loss nan")
    journal.close()
    assert "cannot be reached (Connection refused)" in story.warnings[0]
    assert not any(word in "".join(story.warnings) for word in ("secret", "me:"))


def test_a_slow_server_is_waited_for_at_the_end_only(tmp_path: Path, servers: list[Server]) -> None:
    servers.append(server := Server([200], delay_s=0.2))
    journal = journal_with(tmp_path, server.url, Story(), Patience(end_s=10.0))
    began = time.monotonic()
    journal.event("alert", 1, message="x")
    assert time.monotonic() - began < 0.2
    journal.close()
    assert len(server.taken) == 1


def test_a_secret_url_stays_out_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "https://hooks.example.org/services/T00000000/B0000000000000000001/XXXXXXXXXXXXXXXXXXXXXXX9"
    for setting in (secret, "https://user:pass@host/x", "https://host/x?token=1"):
        with pytest.raises(ValueError, match="env:NAME") as caught:
            check_setting(setting)
        assert "XXX" not in str(caught.value)
        assert "pass@" not in str(caught.value)
    assert check_setting("https://alerts.example.org/opsin") == "https://alerts.example.org/opsin"
    monkeypatch.setenv("ALERTS_URL", secret)
    assert webhook_url(check_setting("env:ALERTS_URL")) == secret
    assert masked(secret) == "https://hooks.example.org/..."


@pytest.mark.parametrize(
    "path",
    [
        "bot123456789:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw/sendMessage",
        "services/T0/B0/abcdefGHIJKLmnopqrstUVWX",
        "hook/c2VjcmV0%2Fc2VjcmV0",
        "hook/c2VjcmV0LXRva2Vu==",
        "hook;key=secret",
        "hook/0123abcd0123abcd",
        "hook/secretsecretsecretsecretsecretsecret",
        "webhookb2/me@there/IncomingWebhook",
        "hook#secret",
        "hook?secret",
        "hook?",
    ],
)
def test_whatever_may_be_a_token_stays_out_of_the_recipe(path: str) -> None:
    with pytest.raises(ValueError, match=r"https://host/\.\.\. seems to hold a token") as caught:
        check_setting(f"https://host/{path}")
    assert path not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["", "/", "/opsin", "/api/v2/alerts.json", "/~me/notifications-of-trainings", "/team-7/hook"]
)
def test_plain_words_may_stand_in_the_recipe(path: str) -> None:
    assert check_setting(f"https://alerts.example.org:8443{path}").endswith(path)


@pytest.mark.parametrize("value", [None, "file:///etc/passwd", "https://host:99999/", "https://host/a b", "no url"])
def test_a_variable_that_holds_no_url_is_a_fault_of_the_user(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("ALERTS_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("ALERTS_URL", value)
    with pytest.raises(ConfigError, match="the environment variable ALERTS_URL is n") as caught:
        webhook_url("env:ALERTS_URL")
    assert value is None or value not in str(caught.value)


@pytest.mark.parametrize("setting", ["file:///x", "env:", "env:a b", "ftp://host"])
def test_what_is_no_webhook_is_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="env:NAME"):
        check_setting(setting)


def test_a_url_after_env_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match="the text after env: is not the name of an environment variable") as caught:
        check_setting("env:https://hooks/SECRET")
    assert "SECRET" not in str(caught.value)
