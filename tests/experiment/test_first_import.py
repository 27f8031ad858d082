"""Methods are imported when they are first asked for, which several threads may do at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from labkit.experiment import registry

SLOW = """
import time
time.sleep(0.3)
METHOD = "whole"
"""


def test_threads_that_ask_while_a_module_is_imported_wait_for_the_whole_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slowly_imported.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    together = threading.Barrier(3)

    def ask(late: float) -> object:
        together.wait(10)
        threading.Event().wait(late)
        return registry._attribute("slowly_imported:METHOD")

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, (0.0, 0.1, 0.2)))
    assert answers == ["whole"] * 3
    with pytest.raises(AttributeError, match="ABSENT"):
        registry._attribute("slowly_imported:ABSENT")
