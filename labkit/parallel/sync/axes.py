"""Where the parts of a gradient are: the axes over which it is summed, and a rank's share of the squared global norm.

If the gradient of a parameter is summed over other axes than dp_shard too (dp_replicate, cp, tp with sequence
parallelism), the local shard is summed over those afterwards. All of that is linear, so the order does not matter.
"""

from __future__ import annotations

from labkit.parallel.cut import ShardSpec
from labkit.parallel.mesh import REDUCED, Mesh


def summed_axes(spec: ShardSpec) -> tuple[str, ...]:
    """Return the axes over which the gradient of a parameter with this shard spec is summed."""
    return tuple(axis for axis in REDUCED if axis not in spec.shard_dims) + tuple(sorted(spec.partial))


def norm_share(spec: ShardSpec, mesh: Mesh) -> float:
    """Return the factor of one rank's squared norm in the global one: below 1 if other ranks hold the same values."""
    return 0.0 if spec.copy else mesh.size("pp", *spec.shard_dims) / mesh.layout.world_size
