"""What one rank sends along every axis of the mesh, counted where it leaves Python.

All collectives of torch.distributed, whoever calls them (labkit, `fully_shard`, the pipeline schedules), end in a
method of `ProcessGroup`; while a `Traffic` is open these methods, and `Work.wait`, count. Only DDP talks to its group
from C++ and is not seen here: `Replicate.communication` asks its own timers.

Per axis are kept

- `calls`: operations, a receive included;
- `bytes`: the payload that this rank hands over: the tensor of an all-reduce, the whole input of a reduce-scatter or
  an all-to-all, the own part of an all-gather, the tensor of a send, that of a broadcast on its source; nothing for a
  receive;
- `wire_bytes`: what leaves this rank by the formulas of a ring of n ranks (Patarasuk and Yuan, 2009): 2·(n-1)/n of an
  all-reduce, (n-1)/n of a reduce-scatter and an all-to-all, (n-1) times an own part gathered, a send as it is (gloo's
  own reduce-scatter sends twice that: it makes a whole all-reduce and throws the rest away);
- `exposed_seconds`: how long computation stood still: in the call and in waiting for it.
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
# Method of ProcessGroup: which argument holds what this rank hands over, and the share of it that leaves the rank.
_SENDS: dict[str, tuple[int, Callable[[int], float]]] = {
    "allreduce": (0, lambda n: 2 * (n - 1) / n),
    "reduce": (0, _ONE_WAY),
    "all_gather_single": (1, lambda n: n - 1),
    "allgather": (1, lambda n: n - 1),
    "reduce_scatter_single": (1, _ONE_WAY),
    "reduce_scatter": (1, _ONE_WAY),
    "all_to_all_single": (1, _ONE_WAY),
    "alltoall": (1, _ONE_WAY),
    # What the three with `single` are called before torch 2.13.
    "_allgather_base": (1, lambda n: n - 1),
    "_reduce_scatter_base": (1, _ONE_WAY),
    "alltoall_base": (1, _ONE_WAY),
    "broadcast": (0, lambda n: 1),
    "send": (0, lambda n: 1),
}
_RECEIVES = ("recv", "recv_anysource")
_GROUPED = "_end_coalescing"
"""NCCL's batches are waited for through what this returns."""


class Clock(Protocol):
    """Moments on the device that computes."""

    def now(self) -> Any: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


class Traffic:
    """Counts while it is open, as a context manager; `axes()` tells what it has seen."""

    def __init__(self, mesh: Mesh, clock: Clock) -> None:
        self._layout, self._rank, self._clock = mesh.layout, mesh.rank, clock
        self._counts: dict[str, list[float]] = {}
        self._moments: list[tuple[str, Any, Any]] = []
        self._names: dict[int, str] = {}
        self._works: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._replaced: list[tuple[type, str, Any]] = []

    def __enter__(self) -> Traffic:
        for name in (*_SENDS, *_RECEIVES, _GROUPED):
            if name in dist.ProcessGroup.__dict__:  # some are named otherwise in other versions of torch
                self._replace(dist.ProcessGroup, name, self._counting)
        self._replace(dist.Work, "wait", self._waiting)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for owner, name, original in reversed(self._replaced):
            setattr(owner, name, original)
        self._replaced.clear()

    def axes(self) -> Axes:
        """The counts so far. On a GPU it waits for the last operation."""
        seconds = dict.fromkeys(self._counts, 0.0)
        for axis, begin, end in self._moments:
            seconds[axis] += self._clock.seconds(begin, end)
        return {
            axis: {"calls": int(calls), "bytes": int(size), "wire_bytes": wire, "exposed_seconds": seconds[axis]}
            for axis, (calls, size, wire) in self._counts.items()
        }

    def _replace(self, owner: type, name: str, by: Callable[[str, Any], Any]) -> None:
        # What stands in the class, not what getattr makes of it: that would no longer bind when it is put back.
        original = owner.__dict__[name]
        self._replaced.append((owner, name, original))
        setattr(owner, name, by(name, getattr(owner, name)))

    def _counting(self, name: str, original: Any) -> Any:
        place, share = _SENDS.get(name, (0, lambda n: 0))

        def call(group: Any, *arguments: Any, **named: Any) -> Any:
            axis = self._axis(group)
            count = self._counts.setdefault(axis, [0, 0, 0.0])
            if name != _GROUPED:
                count[0] += 1
            if name in _SENDS and not (name == "broadcast" and _source(arguments, named) != group.rank()):
                size = _size(arguments[place])
                count[1] += size
                count[2] += share(group.size()) * size
            begin = self._clock.now()
            work = original(group, *arguments, **named)
            self._moments.append((axis, begin, self._clock.now()))
            if work is not None:
                self._works[work] = axis
            return work

        return call

    def _waiting(self, name: str, original: Any) -> Any:
        def wait(work: Any, *arguments: Any, **named: Any) -> Any:
            axis = self._works.get(work)
            if axis is None:  # it began before the trace
                return original(work, *arguments, **named)
            begin = self._clock.now()
            done = original(work, *arguments, **named)
            self._moments.append((axis, begin, self._clock.now()))
            return done

        return wait

    def _axis(self, group: Any) -> str:
        """The axes along which the ranks of the group differ."""
        key = id(group)
        if key not in self._names:
            places = [self._layout.coordinates(rank) for rank in dist.get_process_group_ranks(group)]
            apart = [axis for axis in MESH_ORDER if len({place[axis] for place in places}) > 1]
            self._names[key] = "+".join(apart) or "self"
        return self._names[key]


def _source(arguments: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Place in the group of the rank that a broadcast starts from."""
    options = arguments[1] if len(arguments) > 1 else named.get("opts")
    return int(getattr(options, "rootRank", 0))


def _size(given: Any) -> int:
    """Bytes of a tensor or of the tensors in a (nested) list."""
    if isinstance(given, Tensor):
        return given.numel() * given.element_size()
    return sum(_size(one) for one in given)
