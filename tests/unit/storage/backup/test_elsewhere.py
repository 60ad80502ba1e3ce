from pathlib import Path

import pytest

from opsin.errors import RunError
from opsin.storage.backup import store
from opsin.storage.backup.elsewhere import Elsewhere, begin_elsewhere
from tests.s3_server import KEY, SECRET, S3Server
from tests.story import Story
from tests.unit.storage.backup.small_run import Quiet, mirror, write_run


def test_a_run_in_a_bucket_that_does_not_answer_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_FIRST_PAUSE_S", 0.001)
    for name, value in {
        "ENDPOINT_URL": "http://127.0.0.1:1",
        "ACCESS_KEY_ID": KEY,
        "SECRET_ACCESS_KEY": SECRET,
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    told = Story()
    with pytest.raises(RunError, match="it is unknown whether a run is there") as caught:
        begin_elsewhere(Elsewhere("s3://runs/one", tmp_path / "new"), told)
    assert str(caught.value).endswith("--out DIR backup.path=s3://runs/one")
    assert len(told.notices) == 4
    # One that is here goes on: its backup catches up.
    begin_elsewhere(Elsewhere("s3://runs/one", write_run(tmp_path / "here")), Quiet())


def test_a_bucket_that_refuses_is_asked_once(s3_server: S3Server, s3: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no such bucket; it is unknown whether a run is there"):
        begin_elsewhere(Elsewhere("s3://nowhere/one", tmp_path / "new"), Quiet())


def test_a_run_begins_where_the_bucket_has_none_and_goes_on_where_it_has_one(
    s3_server: S3Server, s3: str, tmp_path: Path
) -> None:
    begin_elsewhere(Elsewhere(s3, tmp_path / "new"), Quiet())
    mirror(write_run(tmp_path / "run", 10), s3).sync()
    with pytest.raises(RunError, match=f"go on with it: opsin resume {s3}"):
        begin_elsewhere(Elsewhere(s3, tmp_path / "new"), Quiet())
