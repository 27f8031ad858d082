"""What one rank sends along every axis of the mesh, counted where it leaves Python.

All collectives of torch.distributed, whoever calls them (labkit, `fully_shard`, the pipeline schedules), end in a
method of `ProcessGroup`; while a `Traffic` is open these methods, and `Work.wait`, count. Only DDP calls its group from
C++ and is not seen here: `Replicate.communication` reads its own timers.

Counted per axis:

- `calls`: operations, receives included;
- `bytes`: the payload that this rank hands over: the tensor of an all-reduce, the whole input of a reduce-scatter or
  an all-to-all, the local part of an all-gather, the tensor of a send, that of a broadcast on its source; nothing for
  a receive;
- `wire_bytes`: what leaves this rank by the formulas of a ring of n ranks (Patarasuk and Yuan, 2009): 2·(n-1)/n of an
  all-reduce, (n-1)/n of a reduce-scatter and an all-to-all, (n-1) times the local part of an all-gather, the bytes of
  a send (gloo's own reduce-scatter sends twice that: it runs a whole all-reduce and discards the rest);
- `exposed_seconds`: how long computation waited: in the call and in waiting for its result. On a GPU that is the time
  in which the stream of the training loop waited. `fully_shard` communicates on streams of its own, where nothing is
  exposed; there, the waits of the loop's stream for others count, on the axis of the last such operation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from labkit.experiment.layout import MESH_ORDER
from labkit.parallel.communication import Axes
from labkit.parallel.mesh import Mesh

_ONE_WAY: Callable[[int], float] = lambda n: (n - 1) / n  # noqa: E731  (a table reads best)
# Method of ProcessGroup: index of the argument that this rank hands over, and the share of it that leaves the rank.
_SENDS: dict[str, tuple[int, Callable[[int], float]]] = {
    "allreduce": (0, lambda n: 2 * (n - 1) / n),
    "reduce": (0, _ONE_WAY),
    "all_gather_single": (1, lambda n: n - 1),
    "allgather": (1, lambda n: n - 1),
    "reduce_scatter_single": (1, _ONE_WAY),
    "reduce_scatter": (1, _ONE_WAY),
    "all_to_all_single": (1, _ONE_WAY),
    "alltoall": (1, _ONE_WAY),
    # Names of the three with `single` before torch 2.13.
    "_allgather_base": (1, lambda n: n - 1),
    "_reduce_scatter_base": (1, _ONE_WAY),
    "alltoall_base": (1, _ONE_WAY),
    "broadcast": (0, lambda n: 1),
    "send": (0, lambda n: 1),
}
_RECEIVES = ("recv", "recv_anysource")
_GROUPED = "_end_coalescing"
"""The method whose result waits for one of NCCL's batches."""


class Clock(Protocol):
    """Timestamps on the computing device, and the seconds between two of them (labkit.training.clock)."""

    def now(self) -> Any: ...

    def stream(self) -> Any: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


class Traffic:
    """Context manager that counts while it is open; `axes()` returns the counts."""

    def __init__(self, mesh: Mesh, clock: Clock) -> None:
        self._layout, self._rank, self._clock = mesh.layout, mesh.rank, clock
        self._counts: dict[str, list[float]] = {}
        self._intervals: list[tuple[str, Any, Any]] = []
        """(axis, begin, end) of every call and every wait."""
        self._names: dict[int, str] = {}
        self._works: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._replaced: list[tuple[type, str, Any]] = []
        self._stream: Any = None
        """The stream of the training loop; None on a CPU."""
        self._axis_beside = ""
        """The axis of the last operation on another stream."""

    def __enter__(self) -> Traffic:
        for name in (*_SENDS, *_RECEIVES, _GROUPED):
            if name in dist.ProcessGroup.__dict__:  # some have other names in other versions of torch
                self._replace(dist.ProcessGroup, name, self._counting)
        self._replace(dist.Work, "wait", self._waiting)
        self._stream = self._clock.stream()
        if self._stream is not None:
            for name in ("wait_event", "wait_stream"):
                if name in type(self._stream).__dict__:
                    self._replace(type(self._stream), name, self._waiting_for_stream)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for owner, name, original in reversed(self._replaced):
            setattr(owner, name, original)
        self._replaced.clear()

    def axes(self) -> Axes:
        """Return the counts so far. On a GPU it waits for the last operation."""
        seconds = dict.fromkeys(self._counts, 0.0)
        for axis, begin, end in self._intervals:
            seconds[axis] += self._clock.seconds(begin, end)
        return {
            axis: {"calls": int(calls), "bytes": int(size), "wire_bytes": wire, "exposed_seconds": seconds[axis]}
            for axis, (calls, size, wire) in self._counts.items()
        }

    def _replace(self, owner: type, name: str, wrap: Callable[[str, Any], Any]) -> None:
        # The attribute as the class stores it: what getattr makes of it would no longer bind after it is put back.
        original = owner.__dict__[name]
        self._replaced.append((owner, name, original))
        setattr(owner, name, wrap(name, getattr(owner, name)))

    def _counting(self, name: str, original: Any) -> Any:
        position, share = _SENDS.get(name, (0, lambda n: 0))

        def call(group: Any, *args: Any, **kwargs: Any) -> Any:
            axis = self._axis(group)
            count = self._counts.setdefault(axis, [0, 0, 0.0])
            if name != _GROUPED:
                count[0] += 1
            if name in _SENDS and not (name == "broadcast" and _source(args, kwargs) != group.rank()):
                size = _size(args[position])
                count[1] += size
                count[2] += share(group.size()) * size
            work = self._timed(axis, lambda: original(group, *args, **kwargs))
            if work is not None:
                self._works[work] = axis
            return work

        return call

    def _waiting(self, name: str, original: Any) -> Any:
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            axis = self._works.get(work)
            if axis is None:  # it began before the trace
                return original(work, *args, **kwargs)
            return self._timed(axis, lambda: original(work, *args, **kwargs))

        return wait

    def _waiting_for_stream(self, name: str, original: Any) -> Any:
        def wait(stream: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._axis_beside or stream != self._stream:
                return original(stream, *args, **kwargs)
            return self._timed(self._axis_beside, lambda: original(stream, *args, **kwargs))

        return wait

    def _timed(self, axis: str, operation: Callable[[], Any]) -> Any:
        """Run an operation and note how long the stream of the training loop waited in it."""
        if self._clock.stream() != self._stream:
            self._axis_beside = axis
            return operation()
        begin = self._clock.now()
        result = operation()
        self._intervals.append((axis, begin, self._clock.now()))
        return result

    def _axis(self, group: Any) -> str:
        """Return the names of the axes along which the ranks of the group differ, joined by `+`."""
        key = id(group)
        if key not in self._names:
            coordinates = [self._layout.coordinates(rank) for rank in dist.get_process_group_ranks(group)]
            axes = [axis for axis in MESH_ORDER if len({of_rank[axis] for of_rank in coordinates}) > 1]
            self._names[key] = "+".join(axes) or "self"
        return self._names[key]


def _source(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the rank within the group that a broadcast starts from."""
    options = args[1] if len(args) > 1 else kwargs.get("opts")
    return int(getattr(options, "rootRank", 0))


def _size(tensors: Any) -> int:
    """Return the bytes of a tensor or of the tensors in a (nested) list."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(tensor) for tensor in tensors)
