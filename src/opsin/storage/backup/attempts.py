"""Asking a place again that does not answer, for whoever has nothing else to do meanwhile."""

import time
from collections.abc import Callable
from typing import TypeVar

from opsin.storage.backup.store import StoreError

Got = TypeVar("Got")

_ATTEMPTS = 5
_FIRST_PAUSE_S = 1.0


def insist(ask: Callable[[], Got], *, say: Callable[[str], None], progress: Callable[[], object] = lambda: None) -> Got:
    """What `ask` gives. Where the place is out of reach it is asked again, with pauses of 1, 2, 4 and 8 s.

    `say` is told of each failure. The attempts are counted anew whenever `progress` has changed.

    Raises:
        StoreError: it refuses, or the last attempt has failed.
    """
    failures, before = 0, progress()
    while True:
        try:
            return ask()
        except StoreError as error:
            if (now := progress()) != before:
                failures, before = 0, now
            failures += 1
            if error.refused or failures == _ATTEMPTS:
                raise
            say(f"{error}; trying again")
        time.sleep(_FIRST_PAUSE_S * 2.0 ** (failures - 1))
