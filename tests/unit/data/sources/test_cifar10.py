"""CIFAR-10 in its official files: reading, and downloading from a server on this machine."""

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from opsin.data.sources.cifar10 import ARCHIVE, FOLDER, TRAIN_BATCHES, fetch_cifar10, open_cifar10
from opsin.errors import DataError

NAMES = [b"airplane", b"automobile", b"bird"]


def batch_files() -> dict[str, bytes]:
    """The official layout with two images in each batch, and numpy's module names of that time."""
    files = {"batches.meta": pickle.dumps({b"label_names": NAMES}, protocol=3)}
    for number, name in enumerate((*TRAIN_BATCHES, "test_batch")):
        pixels = np.random.default_rng(number).integers(0, 256, (2, 3072), dtype=np.uint8)
        batch = pickle.dumps({b"data": pixels, b"labels": [number % 3, 2]}, protocol=3)
        files[name] = batch.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    return files


def archive_bytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, data in batch_files().items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / FOLDER).mkdir()
    for name, data in batch_files().items():
        (tmp_path / FOLDER / name).write_bytes(data)
    return tmp_path / FOLDER


def test_folder_and_archive_hold_the_same(folder: Path) -> None:
    (folder.parent / ARCHIVE).write_bytes(archive_bytes())
    for path in (folder, folder.parent / ARCHIVE):
        train, test = open_cifar10(path)
        assert train.classes == test.classes == ("airplane", "automobile", "bird")
        assert train.labels.tolist() == [0, 2, 1, 2, 2, 2, 0, 2, 1, 2]
        assert test.labels.tolist() == [2, 2]
        # Row-major planes of red, green, blue, as the authors describe the files.
        expected = np.random.default_rng(1).integers(0, 256, (2, 3072), dtype=np.uint8)[1].reshape(3, 32, 32)
        assert torch.equal(train.read(3), torch.from_numpy(expected))
        assert test.location(1) == f"{path} test image 1"


def test_a_pickle_carries_no_pixels(folder: Path) -> None:
    train, _ = open_cifar10(folder)
    pickled = pickle.dumps(train)
    assert len(pickled) < 3072
    assert torch.equal(pickle.loads(pickled).read(7), train.read(7))


def test_missing_and_damaged_batches_are_named(folder: Path) -> None:
    whole = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(whole[:1000])
    with pytest.raises(DataError, match="not CIFAR-10 python batches"):
        open_cifar10(folder)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3 is missing"):
        open_cifar10(folder)
    (folder.parent / ARCHIVE).write_bytes(archive_bytes()[:-3000])
    with pytest.raises(DataError, match="not CIFAR-10 python batches"):
        open_cifar10(folder.parent / ARCHIVE)


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 + 1",)


def test_a_batch_cannot_run_code(folder: Path) -> None:
    (folder / "test_batch").write_bytes(pickle.dumps(_Code()))
    with pytest.raises(DataError, match=r"builtins\.eval does not belong in a batch of images"):
        open_cifar10(folder)


@dataclass
class Server:
    """A server of one archive, which may break off an answer."""

    url: str = ""
    content: bytes = b""
    break_after: int | None = None
    status: int = 200
    answers: int = 0


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(content=archive_bytes())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answers += 1
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(state.content)))
            self.end_headers()
            self.wfile.write(state.content[: state.break_after])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}/"
        yield state
        running.shutdown()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_download_is_verified_and_happens_once(tmp_path: Path, server: Server) -> None:
    first, archive = (fetch_cifar10(tmp_path / "cache", base_url=server.url, md5=md5(server.content)) for _ in range(2))
    assert first == archive
    assert archive.read_bytes() == server.content
    assert server.answers == 1
    assert len(open_cifar10(archive)[0]) == 10


def test_an_interrupted_download_leaves_nothing_and_begins_again(tmp_path: Path, server: Server) -> None:
    server.break_after = 5000
    with pytest.raises(DataError, match="the connection ended after 5,000 of"):
        fetch_cifar10(tmp_path, base_url=server.url, md5=md5(server.content))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    server.break_after = None
    archive = fetch_cifar10(tmp_path, base_url=server.url, md5=md5(server.content))
    assert archive.read_bytes() == server.content


def test_the_rest_of_a_killed_download_is_overwritten(tmp_path: Path, server: Server) -> None:
    (tmp_path / f"{ARCHIVE}.part").write_bytes(server.content * 2)
    fetch_cifar10(tmp_path, base_url=server.url, md5=md5(server.content))
    assert (tmp_path / ARCHIVE).read_bytes() == server.content


def test_a_wrong_file_is_refused_and_deleted(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match=f"md5 {md5(server.content)}, expected c58f30108f718f92721af3b95e74349a"):
        fetch_cifar10(tmp_path, base_url=server.url)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_without_a_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*refused.*put that file into .*data\.path"):
        fetch_cifar10(tmp_path, base_url="http://127.0.0.1:9/")


def test_a_server_error_is_passed_on(tmp_path: Path, server: Server) -> None:
    server.status = 503
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*503"):
        fetch_cifar10(tmp_path, base_url=server.url)
