"""Requests to end a run, with real signals."""

import os
import signal
import threading
from contextlib import suppress

import pytest

from opsin.training.stop import Interrupt, Stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_a_request_that_stays(name: str) -> None:
    with Stop() as stop:
        before = stop.requested
        os.kill(os.getpid(), signal.Signals[name])
        assert (before, stop.requested) == (None, name)
    assert stop.requested == name


def test_a_signal_that_was_swallowed_before_is_a_request_too() -> None:
    before = signal.signal(signal.SIGINT, Interrupt())
    try:
        with suppress(KeyboardInterrupt):  # as an import may do
            os.kill(os.getpid(), signal.SIGINT)
        with Stop() as stop:
            assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_ends_at_once() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_signals_may_repeat() -> None:
    with Stop() as stop:
        for name in ("SIGTERM", "SIGTERM", "SIGUSR1"):
            os.kill(os.getpid(), signal.Signals[name])
        assert stop.requested == "SIGTERM"


def test_handlers_are_given_back_even_after_an_exception() -> None:
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(name) for name in names]
    with suppress(ZeroDivisionError), Stop():
        assert all(signal.getsignal(name) not in before for name in names)
        raise ZeroDivisionError
    assert [signal.getsignal(name) for name in names] == before


def test_the_time_limit_is_wall_clock_since_the_start() -> None:
    assert Stop(hours=1).requested is None
    # A millionth of an hour is 3.6 ms.
    stop = Stop(hours=1e-6)
    while stop.requested is None:
        pass
    assert stop.requested == "limits.hours = 1e-06 reached"


def test_outside_the_main_thread_no_handler_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with Stop() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
