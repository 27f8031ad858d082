"""Bytes that one of N ranks sends for a collective operation (Patarasuk and Yuan, 2009).

| operation   | input of this rank         | it sends          |
|-------------|----------------------------|-------------------|
| all_reduce  | n                          | 2 · (N-1)/N · n   |
| all_gather  | n, its own shard           | (N-1) · n         |
| all_to_all  | n, one N-th for each rank  | (N-1)/N · n       |

These are the costs of the ring algorithms, which gloo and NCCL use.
"""

from __future__ import annotations


def all_reduce_bytes(size: int, world_size: int) -> int:
    """Return the bytes that one of `world_size` ranks sends to all-reduce a tensor of `size` bytes."""
    return round(2 * (world_size - 1) * size / world_size)


def all_gather_bytes(size: int, world_size: int) -> int:
    """Return the bytes that one of `world_size` ranks sends to all-gather shards of `size` bytes each."""
    return (world_size - 1) * size


def all_to_all_bytes(size: int, world_size: int) -> int:
    """Return the bytes that one of `world_size` ranks sends when it distributes `size` bytes evenly over all ranks."""
    return round((world_size - 1) * size / world_size)
