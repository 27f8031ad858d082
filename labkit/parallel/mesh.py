"""The ranks as a mesh: which ranks share which axes, and the process groups in which they communicate.

One `DeviceMesh` over the axes that are larger than one, outermost first as in `MESH_ORDER`. The methods here also take
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
"""Axes over which the gradient of a parameter is summed, unless the parameter itself is sharded along one of them."""


class Mesh:
    """One rank's coordinates in the layout, and the process groups it belongs to.

    The constructor is collective: all ranks make the same groups in the same order.
    """

    def __init__(self, layout: Layout, rank: int, device_type: str, connect: bool = True) -> None:
        self.layout, self.rank = layout, rank
        self.coordinates = layout.coordinates(rank)
        self.device_mesh: DeviceMesh | None = None
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        sizes = {axis: size for axis, size in layout.sizes.items() if size > 1}
        if not sizes or not connect:
            return
        self.device_mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        for axis in sizes:
            self._groups[(axis,)] = self.device_mesh.get_group(axis)
        # Products over which gradients are summed: of whole parameters or of the shards that ZeRO leaves, of experts or
        # of other layers, of layers that see all tokens or (sequence parallelism) a part of them.
        for sharded in ((), ("dp_shard",), ("dp_replicate", "dp_shard")):
            for expert in ((), ("ep",)):
                for partial in ((), ("tp",)):
                    self._make_group(self._normalized({*REDUCED, *partial} - {*sharded, *expert}))

    def size(self, *axes: str) -> int:
        """Return the number of ranks along these axes together."""
        return prod(getattr(self.layout, axis) for axis in axes)

    def index(self, *axes: str) -> int:
        """Return this rank's index along these axes together, the first axis outermost."""
        index = 0
        for axis in axes:
            index = index * getattr(self.layout, axis) + self.coordinates[axis]
        return index

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Return the group of the ranks that differ from this one along these axes only; None if it is alone there."""
        key = self._normalized(axes)
        return self._groups[key] if key else None

    def cpu_group(self, *axes: str) -> dist.ProcessGroup | None:
        """Return a group of the same ranks as `group` for tensors on the CPU, so that no rank waits for its GPU.

        Collective: it makes new groups (gloo) where the others are for GPUs.
        """
        group = self.group(*axes)
        if group is None or self.device_mesh is None or self.device_mesh.device_type == "cpu":
            return group
        own_group: Any = None
        for members in self._rank_groups(self._normalized(axes)):
            new_group = dist.new_group(members, backend="gloo")
            own_group = new_group if self.rank in members else own_group
        return own_group

    def submesh(self, *axes: str) -> DeviceMesh:
        """Return the part of the `DeviceMesh` along these axes, which must all be larger than one."""
        assert self.device_mesh is not None
        return self.device_mesh[axes if len(axes) > 1 else axes[0]]

    @property
    def data_shard(self) -> tuple[int, int]:
        """Index of this rank's shard of every batch, and the number of shards."""
        return self.layout.share(self.rank), self.layout.data_parallel

    @property
    def writer(self) -> int:
        """The rank that writes for this rank's stages: index 0 along every axis but the pipeline."""
        return self.first_rank_at(pp=self.coordinates["pp"])

    def first_rank_at(self, pp: int) -> int:
        """Return the lowest rank at index `pp` of the pipeline axis."""
        return min(rank for rank in range(self.layout.world_size) if self.layout.coordinates(rank)["pp"] == pp)

    def new_group_along(self, axis: str, indices: list[int]) -> dist.ProcessGroup | None:
        """Make the group of the ranks that differ from this one along `axis` only and have one of `indices` there.

        Collective. None for this rank if it does not belong to such a group, and for all if there is only one index.
        """
        if len(indices) == 1:
            return None
        own_group: Any = None
        for members in self._rank_groups((axis,)):
            chosen = [rank for rank in members if self.layout.coordinates(rank)[axis] in indices]
            group = dist.new_group(chosen)
            own_group = group if self.rank in chosen else own_group
        return own_group

    def _rank_groups(self, key: tuple[str, ...]) -> list[list[int]]:
        """Partition all ranks into lists whose members differ along the axes of `key` only."""
        rank_groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.layout.world_size):
            coordinates = self.layout.coordinates(rank)
            rank_groups.setdefault(tuple(coordinates[axis] for axis in MESH_ORDER if axis not in key), []).append(rank)
        return list(rank_groups.values())

    def _normalized(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Return the axes that are larger than one, in the order of the mesh: the key of their group."""
        requested = set(axes)
        return tuple(axis for axis in MESH_ORDER if axis in requested and getattr(self.layout, axis) > 1)

    def _make_group(self, key: tuple[str, ...]) -> None:
        if not key or key in self._groups:
            return
        rank_groups = self._rank_groups(key)
        for members in rank_groups:
            group: Any = dist.group.WORLD if len(rank_groups) == 1 else dist.new_group(members)
            if self.rank in members:
                self._groups[key] = group
