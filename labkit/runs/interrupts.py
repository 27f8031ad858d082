"""A request to end, however it comes: Ctrl-C, SIGTERM (a job that is timed out), SIGHUP (a terminal that is closed)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def endings(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Give all of them to `handler` meanwhile. One that is ignored (nohup) stays ignored.

    Outside the main thread nothing changes.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDINGS:
            previous = signal.getsignal(number)
            if previous is not signal.SIG_IGN and previous is not None:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on each of them."""
    with endings(signal.default_int_handler):
        yield
