"""Signals that ask a process to end: SIGINT (Ctrl-C), SIGTERM (a job that timed out), SIGHUP (a closed terminal)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def on_end_signals(handler: Callable[[int, Any], Any], replace: bool = True) -> Iterator[None]:
    """Install `handler` for all END_SIGNALS within the context. Signals that are ignored (nohup) stay ignored.

    With `replace` False, signals that already have a handler other than Python's default keep it (a Jupyter kernel
    handles SIGINT). Outside the main thread nothing changes.
    """
    own = (signal.SIG_DFL, signal.default_int_handler)
    previous_handlers: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signal_number in END_SIGNALS:
            previous = signal.getsignal(signal_number)
            if previous in (signal.SIG_IGN, None) or not (replace or previous in own):
                continue
            previous_handlers[signal_number] = signal.signal(signal_number, handler)
    try:
        yield
    finally:
        for signal_number, previous in previous_handlers.items():
            signal.signal(signal_number, previous)


@contextmanager
def as_interrupts(replace: bool = True) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on each of END_SIGNALS; `replace` as for `on_end_signals`."""
    with on_end_signals(signal.default_int_handler, replace):
        yield
