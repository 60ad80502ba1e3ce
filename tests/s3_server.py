"""moto's S3 over real HTTP, in a process of its own to be stopped or killed. Killed, it forgets all that it held."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

BUCKET = "runs"
SECRET = "do-not-write-this-anywhere-0123456789"
KEY = "AKIAQWERTYUIOPASDFGH"


class S3Server:
    """A server with one empty bucket."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a user exports to reach it."""
        return {
            "AWS_ENDPOINT_URL": self._url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        self._process = subprocess.Popen(command, env=environment, **quiet)  # type: ignore[call-overload]
        end = time.monotonic() + 300
        while True:
            try:
                self.make_bucket(BUCKET)
                return
            except OSError:
                assert time.monotonic() < end, "the server does not answer"
                assert self._process.poll() is None, "the server has ended"
                time.sleep(0.1)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """From now on it takes connections and never answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again, also what was asked meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self._url}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}"
