"""Detect models that read the clock, which no seed controls: ranks and repeated runs may compute different numbers.

If the clock changes results from pass to pass, comparing passes shows it (exactness.py). That cannot show a phase that
lasts for hours, so calls are watched instead (issue 11).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from types import FrameType
from typing import Any

CLOCKS = {
    *(time.time, time.time_ns, time.monotonic, time.monotonic_ns, time.perf_counter, time.perf_counter_ns),
    *(time.localtime, time.gmtime, time.strftime, time.ctime),
}
_TODAY = {("now", datetime), ("utcnow", datetime), ("today", datetime), ("today", date)}
_LIBRARIES = sys.stdlib_module_names | {"torch", "accelerate", "labkit", "tqdm"}
"""Packages that read the clock for their own messages and time limits."""


class ClockWatch:
    """Record which function of the user's own code reads a clock while `watching()`."""

    def __init__(self) -> None:
        self.reader = ""
        """The first call, e.g. `Net.forward calls time.time`; empty if there was none."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calls of this thread inside the context, unless a debugger or profiler is already watching."""
        if self.reader or sys.getprofile() is not None:
            yield
            return
        sys.setprofile(self._see)
        try:
            yield
        finally:
            sys.setprofile(None)

    def notes(self) -> list[str]:
        """Return a sentence about the call; [] if there was none."""
        if not self.reader:
            return []
        return [f"{self.reader}, which no seed controls: if the output depends on it, ranks and repeated runs differ"]

    def _see(self, frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or not _is_clock(called):
            return
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _LIBRARIES:
            owner = called.__self__.__name__  # the module `time`, or the class `datetime`
            self.reader = self.reader or f"{frame.f_code.co_qualname} calls {owner}.{called.__name__}"


def _is_clock(called: Any) -> bool:
    """Return whether a built-in function returns the time of day or the time since some start."""
    owner = getattr(called, "__self__", None)
    if isinstance(owner, type):
        return any(called.__name__ == name and issubclass(owner, of) for name, of in _TODAY)
    return getattr(owner, "__name__", "") == "time" and called in CLOCKS
