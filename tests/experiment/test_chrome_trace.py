"""Chrome traces from untrusted bytes: own times, busy times, and limits."""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.experiment import chrome_trace
from labkit.experiment.chrome_trace import busy_seconds, operations, spans, unpack


def event(name: str, begin: float, duration: float, category: str = "cpu_op", **more: Any) -> dict[str, Any]:
    """A span from `begin`, in milliseconds."""
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": 1e3 * begin,
        "dur": 1e3 * duration,
        "pid": 1,
        "tid": 1,
    } | more


def trace(*events: Any) -> bytes:
    return json.dumps({"traceEvents": list(events)}).encode()


def milliseconds(*events: Any) -> dict[str, float]:
    return {operation.name: 1e3 * operation.seconds for operation in operations(spans(trace(*events)))}


def test_time_inside_belongs_to_what_runs_inside() -> None:
    own = milliseconds(event("linear", 0, 10), event("addmm", 1, 6), event("copy", 2, 1), event("add", 8, 1))
    assert own == pytest.approx({"linear": 3, "addmm": 5, "copy": 1, "add": 1})


def test_equal_names_add_up_and_the_longest_comes_first() -> None:
    found = operations(spans(trace(event("a", 0, 1), event("b", 2, 5), event("a", 8, 2))))
    assert [(operation.name, operation.calls) for operation in found] == [("b", 1), ("a", 2)]


def test_threads_do_not_contain_each_other() -> None:
    assert milliseconds(event("a", 0, 10), event("b", 1, 5, tid=2)) == pytest.approx({"a": 10, "b": 5})


def test_a_gpu_is_busy_while_any_of_its_streams_is() -> None:
    kernels = [event("k", 0, 4, "kernel"), event("k", 2, 4, "kernel", tid=7), event("m", 10, 1, "gpu_memcpy")]
    assert busy_seconds(spans(trace(*kernels, event("host", 0, 100)))) == pytest.approx(7e-3)


@pytest.mark.parametrize(
    "strange",
    [
        None,
        7,
        {"ph": "X"},
        event("a", 0, 1) | {"dur": -1},
        event("a", 0, 1) | {"dur": "1"},
        event("a", 0, 1) | {"dur": True},
        event("a", 0, 1) | {"ts": 1e300},
        event("a", 0, 1) | {"name": ["a"]},
        event("a", 0, 1) | {"cat": {}},
        event("a", 0, 1) | {"ph": "M"},
    ],
)
def test_events_of_another_kind_are_left_out(strange: Any) -> None:
    assert milliseconds(strange, event("kept", 0, 1)) == pytest.approx({"kept": 1})


@pytest.mark.parametrize("duration", ["NaN", "Infinity", "1e999"])
def test_times_that_are_not_finite_are_left_out(duration: str) -> None:
    text = trace(event("a", 0, 1)).replace(b'"dur": 1000.0', f'"dur": {duration}'.encode())
    assert spans(text) == []


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"traceEvents": 1}', b"\xff", b"[" * 10**5, b"null"])
def test_other_files_are_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"chrome trace|nested|decode|Expecting|invalid"):
        spans(text)


def test_names_are_short() -> None:
    assert len(spans(trace(event("a" * 10_000, 0, 1)))[0].name) == chrome_trace.MAX_NAME


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chrome_trace, "MAX_TRACE_BYTES", 2**20)
    assert len(unpack(gzip.compress(b" " * 2**20))) == 2**20
    with pytest.raises(ValueError, match="more than 1 MiB"):
        unpack(gzip.compress(b" " * (2**20 + 1)))


@pytest.mark.parametrize(
    "data", [b"", b"no gzip", gzip.compress(b"some text" * 100)[:-20]], ids=["empty", "other", "cut"]
)
def test_damaged_files_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged|cut off"):
        unpack(data)


times = st.floats(0, 1e6, allow_nan=False)
events = st.builds(
    event, st.sampled_from("abc"), times, times, st.sampled_from(["cpu_op", "kernel"]), tid=st.integers(0, 2)
)


@given(st.lists(events, max_size=30))
def test_own_times_are_never_negative_nor_longer_than_the_spans(given_events: list[dict[str, Any]]) -> None:
    measured = spans(trace(*given_events))
    total = sum(span.seconds for span in measured)
    found = operations(measured)
    assert all(operation.seconds >= 0 for operation in found)
    assert math.fsum(operation.seconds for operation in found) <= total * (1 + 1e-9) + 1e-9
    assert sum(operation.calls for operation in found) == len(measured)
    assert 0 <= busy_seconds(measured) <= total * (1 + 1e-9) + 1e-9
