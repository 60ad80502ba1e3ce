import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsin.errors import ConfigError
from opsin.storage.backup.bucket import Bucket
from opsin.storage.backup.open import Folder, open_store
from opsin.storage.backup.store import Absent, BackupStore, StoreError, put_bytes, read_bytes
from tests.s3_server import BUCKET, KEY, SECRET, S3Server

LARGE = 9 * 2**20  # more than one part of an upload


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BackupStore:
    return Folder(tmp_path / "backup") if request.param == "folder" else Bucket(request.getfixturevalue("s3"))


def put(store: BackupStore, name: str, data: bytes) -> None:
    chunks = (data[start : start + 2**20] for start in range(0, len(data), 2**20))
    store.put(name, chunks, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def holds(store: BackupStore, name: str, data: bytes) -> bool:
    return store.holds(name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def test_a_place_gives_back_what_it_got(store: BackupStore) -> None:
    large = bytes(range(256)) * (LARGE // 256)
    assert store.names() == []
    put(store, "a/large.bin", large)
    put_bytes(store, "b.txt", b"old")
    put_bytes(store, "b.txt", b"new")
    put_bytes(store, "a/empty", b"")
    assert store.names() == ["a/empty", "a/large.bin", "b.txt"]
    assert store.names("a") == ["a/empty", "a/large.bin"]
    assert read_bytes(store, "b.txt") == b"new"
    assert read_bytes(store, "a/large.bin") == large
    assert holds(store, "a/large.bin", large)
    assert not holds(store, "a/large.bin", large[:-1] + b"!")
    assert not holds(store, "nothing", large)
    assert read_bytes(store, "nothing") is None
    with pytest.raises(Absent):
        list(store.fetch("nothing"))
    store.remove("a/large.bin")
    store.remove("nothing")
    assert store.names() == ["a/empty", "b.txt"]


def test_a_file_is_given_from_any_byte_on(store: BackupStore) -> None:
    put_bytes(store, "file", b"0123456789")
    assert [b"".join(store.fetch("file", start=start)) for start in (0, 4, 10, 11)] == [
        b"0123456789",
        b"456789",
        b"",
        b"",
    ]
    with pytest.raises(Absent):
        list(store.fetch("nothing", start=4))


@pytest.mark.parametrize("size", [3 * 2**20, LARGE])
def test_a_file_that_breaks_off_is_not_there(store: BackupStore, size: int) -> None:
    def broken() -> Iterator[bytes]:
        for _ in range(size // 2**20 - 1):
            yield bytes(2**20)
        raise RuntimeError("unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        store.put("file", broken(), size=size, sha256="")
    assert store.names() == []


def test_a_folder_of_a_disk_that_is_not_mounted_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no folder .*disk/runs \(make it, or mount its disk\)"):
        put_bytes(Folder(tmp_path / "disk" / "runs" / "one"), "file", b"")
    assert list(tmp_path.iterdir()) == []


def test_a_server_out_of_reach_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(StoreError) as caught:
        read_bytes(open_store("s3://runs/one"), "file")
    assert str(caught.value) == "s3://runs/one: HTTP error: error sending request"
    assert not caught.value.refused


def test_a_bucket_that_is_missing_refuses(s3_server: S3Server, s3: str) -> None:
    for ask in (lambda store: store.names(), lambda store: put_bytes(store, "file", b"1")):
        with pytest.raises(StoreError, match="no such bucket") as caught:
            ask(open_store(s3.replace(BUCKET, "others")))
        assert caught.value.refused


def test_keys_come_from_the_shared_files_too(
    s3_server: S3Server, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / ".aws").mkdir()
    keys = f"[default]\naws_access_key_id = no\n[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
    (tmp_path / ".aws" / "credentials").write_text(keys)
    (tmp_path / ".aws" / "config").write_text("[profile lab]\nregion = eu-west-1\n")
    store = Bucket(s3)
    assert store.secrets == {
        "aws_access_key_id": KEY,
        "aws_secret_access_key": SECRET,
        "aws_region": "eu-west-1",
    }
    put_bytes(store, "file", b"1")
    assert read_bytes(store, "file") == b"1"


def test_without_the_library_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opsin.storage.backup.bucket", raising=False)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ConfigError, match="object stores need the package obstore; pip install obstore"):
        open_store("s3://runs/one")
