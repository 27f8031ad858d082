"""Something that is done again and again in the background while something else goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def periodically(action: Callable[[], None], seconds: float, name: str) -> Iterator[None]:
    """Call `action` every `seconds` in a thread called `name`, inside the context; nothing may be forked in it."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
