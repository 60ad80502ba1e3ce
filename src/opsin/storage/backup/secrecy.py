"""No secret leaves the process: neither in the URL of a recipe nor in a message."""

import os
import re
from collections.abc import Mapping

_HIDDEN = "***"
_SECRET_NAMES = re.compile(
    r"KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|SIGNATURE|SAS|CONNECTION_STRING", re.IGNORECASE
)
_SECRET_FORMS = (
    re.compile(r"(?<=://)\S+(?=@)"),  # user:password@, where the password may hold a slash
    re.compile(r"(?<=[?&])[^\s<>\"']+"),  # all that follows a question mark in an address
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}\b"),  # names of AWS keys
    re.compile(r"(?<=Bearer )\S+"),
)
_SHORTEST = 8  # a value of fewer letters is a switch or a number; to hide it would hide words


def has_secret(url: str) -> bool:
    """Whether an address holds what only the environment may: a user, a password, a query with a signature."""
    # Not by the parts of a URL: a secret with a slash would end the first of them.
    bucket = url.partition("://")[2].partition("/")[0]
    return ":" in bucket or any(sign in url for sign in "@?#")


def masked(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with stars for every secret of the environment, and for all that looks like one."""
    environment = os.environ if environment is None else environment
    secrets = {value for name, value in environment.items() if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST}
    # The longest first: one may be the beginning of another.
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    for form in _SECRET_FORMS:
        text = form.sub(_HIDDEN, text)
    return text
