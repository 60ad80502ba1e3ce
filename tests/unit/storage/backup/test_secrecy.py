import pytest

from opsin.storage.backup.config import BackupConfig, check_path, has_secret, masked

SECRETS = ("wJalr", "XUt", "hunter2hunter2", "AKIAQWERTYUIOPASDFGH", "deadbeefsignature")


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAQWERTYUIOPASDFGH:hunter2hunter2@runs/one",
        "s3://AKIA:wJalr/XUt@runs/one",
        "s3://AKIA:wJalr/XUt",
        "s3://runs/wJalr@XUt@one",
        "s3://runs/one?X-Amz-Signature=deadbeefsignature",
        "az://runs/one?sv=1&sig=deadbeefsignature",
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(url: str) -> None:
    assert has_secret(url)
    with pytest.raises(ValueError, match="keys belong in the environment") as caught:
        check_path(url)
    assert not any(secret in str(caught.value) for secret in SECRETS)


def test_messages_hide_secrets_of_the_environment_and_what_looks_like_one() -> None:
    environment = {
        "AWS_SECRET_ACCESS_KEY": "hunter2hunter2",
        "AWS_SESSION_TOKEN": "hunter2hunter2more",
        "DEBUG_KEYS": "1",
    }
    text = (
        "PUT https://me:hunter2hunter2@host/runs/1?X-Amz-Signature=deadbeefsignature failed for "
        "AKIAQWERTYUIOPASDFGH, Bearer deadbeefsignature and hunter2hunter2more"
    )
    assert masked(text, environment) == "PUT https://***@host/runs/1?*** failed for ***, Bearer *** and ***"


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("ftp://runs/one", r"must begin with s3://, gs://, az:// or be a folder"),
        ("s3:///one", r"must name a bucket: s3://BUCKET/FOLDER"),
        (" ", r"must be a folder, or an address"),
    ],
)
def test_what_is_no_place_is_refused(path: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        BackupConfig(path=path)


def test_a_place_is_a_folder_or_an_address() -> None:
    assert [check_path(path) for path in ("~/backup", "s3://runs/one/", "gs://runs")] == [
        "~/backup",
        "s3://runs/one",
        "gs://runs",
    ]
