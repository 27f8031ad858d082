"""A request to end, however it comes: Ctrl-C, SIGTERM (a job that is timed out), SIGHUP (a terminal that is closed)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def endings(handler: Callable[[int, Any], Any], replace: bool = True) -> Iterator[None]:
    """Give all of them to `handler` meanwhile. One that is ignored (nohup) stays ignored.

    With `replace` False, so does one that somebody else handles already (a kernel handles SIGINT), which Python's own
    KeyboardInterrupt is not. Outside the main thread nothing changes.
    """
    own = (signal.SIG_DFL, signal.default_int_handler)
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in ENDINGS:
            previous = signal.getsignal(number)
            if previous in (signal.SIG_IGN, None) or not (replace or previous in own):
                continue
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def as_interrupts(replace: bool = True) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on each of them; `replace` as for `endings`."""
    with endings(signal.default_int_handler, replace):
        yield
