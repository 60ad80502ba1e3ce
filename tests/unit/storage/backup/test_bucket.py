"""Slow lines and silent servers, over real HTTP."""

import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opsin.storage.backup import bucket
from opsin.storage.backup.bucket import Bucket
from opsin.storage.backup.store import StoreError, put_bytes, read_bytes
from tests.s3_server import KEY

CONTENT = bytes(range(256)) * 4096  # 1 MiB
PIECE = 2**16


class Server(ThreadingHTTPServer):
    """Answers at a port of its own until `close`."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def handle_error(self, *arguments: object) -> None:
        """A client that has hung up."""

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class SlowStore:
    """Speaks enough of S3 to give one file and to take parts, `pause_s` for each 64 KiB, over one line for all."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        self.silent_after = len(CONTENT)
        self.starts: list[int] = []
        self.most_at_once = 0
        self.at_once = 0
        self._line = threading.Lock()
        self._ended = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
                store.starts.append(start)
                of = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
                facts = {"ETag": '"x"', "Last-Modified": "Sat, 21 Nov 2026 12:00:00 GMT", **of}
                self.answer(206 if start else 200, facts, len(CONTENT) - start)
                for at in range(start, len(CONTENT), PIECE):
                    if at >= store.silent_after:
                        store._ended.wait(20)
                    store.wait()
                    self.wfile.write(CONTENT[at : at + PIECE])

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                begun = "<UploadId>1</UploadId>" if "uploads" in self.path else '<ETag>"x"</ETag>'
                kind = "InitiateMultipartUpload" if "uploads" in self.path else "CompleteMultipartUpload"
                body = f"<{kind}Result><Bucket>b</Bucket><Key>k</Key>{begun}</{kind}Result>".encode()
                self.answer(200, {}, len(body))
                self.wfile.write(body)

            def do_PUT(self) -> None:
                store.at_once += 1
                store.most_at_once = max(store.most_at_once, store.at_once)
                try:
                    for _ in range(int(self.headers["Content-Length"]) // PIECE):
                        self.rfile.read(PIECE)
                        store.wait()
                finally:
                    store.at_once -= 1
                self.answer(200, {"ETag": '"x"'}, 0)

            def do_DELETE(self) -> None:
                self.answer(204, {}, 0)

            def answer(self, status: int, facts: dict[str, str], size: int) -> None:
                self.send_response(status)
                for name, value in {**facts, "Content-Length": str(size)}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = Server(Handler)
        self.url = self._server.url

    def wait(self) -> None:
        with self._line:
            time.sleep(self.pause_s)

    def close(self) -> None:
        self._ended.set()
        self._server.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowStore]:
    store = SlowStore(0.1)
    for name, value in {
        "ENDPOINT_URL": store.url,
        "ACCESS_KEY_ID": "k",
        "SECRET_ACCESS_KEY": "s",
        "REGION": "r",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(bucket, "_RETRY", {"max_retries": 0, "retry_timeout": timedelta(seconds=0.1)})
    yield store
    store.close()


def test_a_file_may_take_as_long_as_it_takes(slow: SlowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_SILENCE", timedelta(seconds=0.8))
    monkeypatch.setattr(bucket, "_SENDING", timedelta(seconds=0.8))
    began = time.monotonic()
    assert b"".join(Bucket("s3://b/run").fetch("file")) == CONTENT
    assert time.monotonic() - began > 1.5


def test_what_came_before_a_server_fell_silent_is_kept(slow: SlowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_SILENCE", timedelta(seconds=0.5))
    slow.pause_s, slow.silent_after = 0, len(CONTENT) // 2
    place, got = Bucket("s3://b/run"), bytearray()

    def fetch() -> None:
        for chunk in place.fetch("file"):
            got.extend(chunk)

    with pytest.raises(StoreError) as caught:
        fetch()
    assert not caught.value.refused
    assert CONTENT[: len(got)] == got
    assert len(got) > len(CONTENT) // 4
    slow.silent_after = len(CONTENT)
    assert bytes(got) + b"".join(place.fetch("file", start=len(got))) == CONTENT
    assert slow.starts == [0, len(got)]


def test_on_a_slow_line_the_parts_of_a_file_go_one_after_the_other(
    slow: SlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A part alone takes 0.4 s, and among four of them 1.6 s.
    monkeypatch.setattr(bucket, "_PART", 4 * PIECE)
    monkeypatch.setattr(bucket, "_SENDING", timedelta(seconds=1.2))
    place = Bucket("s3://b/run")

    def put() -> None:
        place.put("file", iter([CONTENT[:PIECE]] * 16), size=len(CONTENT), sha256="0")

    with pytest.raises(StoreError) as caught:
        put()
    assert not caught.value.refused
    assert slow.most_at_once == 4
    while slow.at_once:  # it reads what was under way
        time.sleep(0.01)
    slow.most_at_once = 0
    put()
    assert slow.most_at_once == 1


def refusing(status: int, code: str) -> Server:
    """An Azure that gives this answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            body = f"<?xml version='1.0'?><Error>\n <Code>{code}</Code>\n <Message>{KEY}</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        def log_message(self, *arguments: object) -> None:
            pass

    return Server(Handler)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "ContainerNotFound", "there is no such bucket"),
        (403, "AuthorizationFailure", "Server returned non-2xx status code: 403 Forbidden (AuthorizationFailure)"),
    ],
)
def test_what_azure_refuses_is_refused_whatever_is_asked(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, said: str
) -> None:
    server = refusing(status, code)
    facts = {"ENDPOINT": f"{server.url}/me", "ACCOUNT_NAME": "me", "ACCOUNT_KEY": b64encode(KEY.encode()).decode()}
    for name, value in facts.items():
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
    place = Bucket("az://runs/one")
    asked: list[Callable[[], object]] = [
        place.names,
        lambda: read_bytes(place, "x"),
        lambda: put_bytes(place, "x", b""),
    ]
    for ask in asked:
        with pytest.raises(StoreError) as caught:
            ask()
        assert (str(caught.value), caught.value.refused) == (f"az://runs/one: {said}", True)
    server.close()


def test_where_no_credentials_are_found_they_are_asked_for(slow: SlowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        StoreError, match=r"s3://b/run: no credentials: the environment has none \(AWS_ACCESS"
    ) as caught:
        Bucket("s3://b/run").names()
    assert caught.value.refused
