"""Chrome traces, the format of torch.profiler: what took how long on which thread or GPU, from untrusted bytes.

The rank that writes a profile and its readers use the same limits, so that what was written can be read. Nothing in a
trace is believed: its size is bounded before and after decompression, and events that are not of the expected kind are
left out.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from labkit.experiment.safe_files import from_json

MAX_TRACE_BYTES = 64 * 2**20
"""Maximum size of a trace as JSON: about 250,000 events."""
MAX_PACKED_BYTES = 32 * 2**20
"""Maximum size of its compressed file."""
MAX_NAME = 200
_ON_CPU, _ON_GPU = ("cpu_op", "user_annotation"), ("kernel", "gpu_memcpy", "gpu_memset")
_LATEST_US = 1e18
_GZIP = 16 + zlib.MAX_WBITS


class Span(NamedTuple):
    """An operation on a thread of the host, or a kernel or copy on a stream of a GPU."""

    name: str
    on_gpu: bool
    track: str
    """Process and thread, or GPU and stream."""
    begin: float
    """Start on the clock of the trace (s)."""
    seconds: float


class Operation(NamedTuple):
    """All spans of a name on the same kind of device."""

    name: str
    on_gpu: bool
    calls: int
    seconds: float
    """Time of these calls without that of operations inside them (s)."""


def unpack(data: bytes) -> bytes:
    """Return the JSON in a gzip file; raise ValueError with a reason if it is damaged or too large."""
    unpacker = zlib.decompressobj(_GZIP)
    try:
        text = unpacker.decompress(data, MAX_TRACE_BYTES + 1)
    except zlib.error:
        raise ValueError("it is not a gzip file, or damaged") from None
    if len(text) > MAX_TRACE_BYTES:
        raise ValueError(f"it has more than {MAX_TRACE_BYTES >> 20} MiB")
    if not unpacker.eof:
        raise ValueError("it is cut off")
    return text


def spans(text: bytes) -> list[Span]:
    """Return the operations and kernels of a trace; raise ValueError if it is not one."""
    trace = from_json(text, bounded_numbers=False)
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list):
        raise ValueError("it is not a chrome trace")
    return [span for event in events if (span := _span(event)) is not None]


def _span(event: Any) -> Span | None:
    """Return the span of an event of a trace; None if it is another kind of event or invalid."""
    if not isinstance(event, dict) or event.get("ph") != "X":
        return None
    category, name = event.get("cat"), event.get("name")
    begin, duration = _microseconds(event.get("ts")), _microseconds(event.get("dur"))
    if category not in (*_ON_CPU, *_ON_GPU) or not isinstance(name, str) or begin is None or duration is None:
        return None
    track = f"{str(event.get('pid'))[:40]}/{str(event.get('tid'))[:40]}"
    return Span(name[:MAX_NAME], category in _ON_GPU, track, begin, duration)


def _microseconds(value: Any) -> float | None:
    """Return a time of the trace (microseconds) in seconds; None if it is not a sensible number."""
    if type(value) not in (int, float) or not 0 <= value < _LATEST_US or not math.isfinite(value):
        return None
    return float(value) / 1e6


def busy_seconds(measured: Iterable[Span]) -> float:
    """Return for how long at least one kernel or copy ran on a GPU (s)."""
    busy = end = 0.0
    for span in sorted((span for span in measured if span.on_gpu), key=lambda span: span.begin):
        stop = span.begin + span.seconds
        busy += max(0.0, stop - max(end, span.begin))
        end = max(end, stop)
    return busy


def operations(measured: Sequence[Span]) -> list[Operation]:
    """Return the operations by name and kind of device, those with the most time of their own first."""
    calls: dict[tuple[str, bool], int] = defaultdict(int)
    seconds: dict[tuple[str, bool], float] = defaultdict(float)
    tracks: dict[tuple[str, bool], list[Span]] = defaultdict(list)
    for span in measured:
        tracks[span.track, span.on_gpu].append(span)
    for track in tracks.values():
        for span, own in _own_seconds(track):
            calls[span.name, span.on_gpu] += 1
            seconds[span.name, span.on_gpu] += own
    totals = [Operation(*key, calls[key], seconds[key]) for key in seconds]
    return sorted(totals, key=lambda operation: -operation.seconds)


def _own_seconds(track: list[Span]) -> Iterable[tuple[Span, float]]:
    """Yield the spans of a thread with their time outside of spans that they contain (s)."""
    inner = [0.0] * len(track)
    open_spans: list[int] = []
    track.sort(key=lambda span: (span.begin, -span.seconds))
    for index, span in enumerate(track):
        while open_spans and track[open_spans[-1]].begin + track[open_spans[-1]].seconds <= span.begin:
            open_spans.pop()
        if open_spans:
            inner[open_spans[-1]] += span.seconds
        open_spans.append(index)
    return ((span, max(0.0, span.seconds - hidden)) for span, hidden in zip(track, inner, strict=True))
