"""The ranks as a mesh: who shares which axis with whom, and the process groups to talk in.

One `DeviceMesh` over the axes that are larger than one, outermost first as in `MESH_ORDER`. Methods here also speak of
products of axes, for which a mesh has no name: ranks that see different samples are `dp_replicate × dp_shard × ep`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from labkit.experiment.layout import MESH_ORDER, Layout

REDUCED = ("dp_replicate", "dp_shard", "cp", "ep")
"""Axes over which the gradient of a parameter is summed, unless the parameter itself is cut along one of them."""


class Mesh:
    """The place of one rank in the layout.

    Making it is collective: all ranks make the same groups in the same order.
    """

    def __init__(self, layout: Layout, rank: int, device_type: str, connect: bool = True) -> None:
        self.layout, self.rank = layout, rank
        self.place = layout.coordinates(rank)
        self.device_mesh: DeviceMesh | None = None
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        named = {axis: size for axis, size in layout.sizes.items() if size > 1}
        if not named or not connect:
            return
        self.device_mesh = init_device_mesh(device_type, tuple(named.values()), mesh_dim_names=tuple(named))
        for axis in named:
            self._groups[(axis,)] = self.device_mesh.get_group(axis)
        # Products over which gradients are summed: whole or from the part that ZeRO has left, of experts or of others,
        # of what sees all tokens or (sequence parallelism) a part of them.
        for sharded in ((), ("dp_shard",), ("dp_replicate", "dp_shard")):
            for cut in ((), ("ep",)):
                for partial in ((), ("tp",)):
                    self._make(self._key({*REDUCED, *partial} - {*sharded, *cut}))

    def size(self, *axes: str) -> int:
        """Number of ranks along these axes together."""
        return prod(getattr(self.layout, axis) for axis in axes)

    def index(self, *axes: str) -> int:
        """Place of this rank along these axes together, the first axis outermost."""
        index = 0
        for axis in axes:
            index = index * getattr(self.layout, axis) + self.place[axis]
        return index

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along these axes only; None if this rank is alone there."""
        key = self._key(axes)
        return self._groups[key] if key else None

    def on_host(self, *axes: str) -> dist.ProcessGroup | None:
        """The same ranks as in `group`, to talk about numbers in the host's memory: no rank waits for its GPU then.

        Makes groups where the others are for GPUs: all ranks call it.
        """
        group = self.group(*axes)
        if group is None or self.device_mesh is None or self.device_mesh.device_type == "cpu":
            return group
        found: Any = None
        for family in self._families(self._key(axes)):
            made = dist.new_group(family, backend="gloo")
            found = made if self.rank in family else found
        return found

    def sub(self, *axes: str) -> DeviceMesh:
        """The part of the `DeviceMesh` along these axes, which are all larger than one."""
        assert self.device_mesh is not None
        return self.device_mesh[axes if len(axes) > 1 else axes[0]]

    @property
    def samples(self) -> tuple[int, int]:
        """Which share of every batch is this rank's, of how many."""
        return self.layout.share(self.rank), self.layout.data_parallel

    @property
    def writer(self) -> int:
        """The rank with the same stages that stands first along every other axis."""
        return self.first_with(pp=self.place["pp"])

    def first_with(self, pp: int) -> int:
        """The rank at `pp` along the pipeline that stands first along every other axis."""
        return min(rank for rank in range(self.layout.world_size) if self.layout.coordinates(rank)["pp"] == pp)

    def along(self, axis: str, places: list[int]) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along `axis` only and stand at `places` there; None if there is one.

        Makes groups: all ranks call it.
        """
        if len(places) == 1:
            return None
        found: Any = None
        for family in self._families((axis,)):
            chosen = [rank for rank in family if self.layout.coordinates(rank)[axis] in places]
            group = dist.new_group(chosen)
            found = group if self.rank in chosen else found
        return found

    def _families(self, key: tuple[str, ...]) -> list[list[int]]:
        """The ranks that differ along the axes of `key` only, for every place along the others."""
        families: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.layout.world_size):
            place = self.layout.coordinates(rank)
            families.setdefault(tuple(place[axis] for axis in MESH_ORDER if axis not in key), []).append(rank)
        return list(families.values())

    def _key(self, axes: Iterable[str]) -> tuple[str, ...]:
        wanted = set(axes)
        return tuple(axis for axis in MESH_ORDER if axis in wanted and getattr(self.layout, axis) > 1)

    def _make(self, key: tuple[str, ...]) -> None:
        if not key or key in self._groups:
            return
        families = self._families(key)
        for family in families:
            group: Any = dist.group.WORLD if len(families) == 1 else dist.new_group(family)
            if self.rank in family:
                self._groups[key] = group
