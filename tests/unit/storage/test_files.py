"""Files replaced whole."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsin.storage.files import replace_file, write_atomic


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        write_atomic(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"old")
    program = (
        "import resource, signal, sys, pathlib\n"
        "from opsin.storage.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "write_atomic(pathlib.Path(sys.argv[1]), bytes(1000))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_chunks_that_fail_leave_the_old_content(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half of"
        raise ValueError("no more")

    write_atomic(tmp_path / "file", b"old")
    with pytest.raises(ValueError, match="no more"):
        replace_file(tmp_path / "file", chunks(), temporary=tmp_path / ".file.sending")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
