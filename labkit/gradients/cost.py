"""What an operation between N ranks costs one of them, in bytes that it sends (Patarasuk and Yuan, 2009).

| operation   | this rank hands over       | and sends         |
|-------------|----------------------------|-------------------|
| all_reduce  | n                          | 2 · (N-1)/N · n   |
| all_gather  | n, its own part            | (N-1) · n         |
| all_to_all  | n, one N-th for each rank  | (N-1)/N · n       |

These are the ring algorithms, by which gloo and NCCL send.
"""

from __future__ import annotations


def all_reduce_bytes(size: int, world_size: int) -> int:
    """What one of `world_size` ranks sends when a tensor of `size` bytes is added up over all."""
    return round(2 * (world_size - 1) * size / world_size)


def all_gather_bytes(size: int, world_size: int) -> int:
    """The same when each rank's part of `size` bytes goes to all."""
    return (world_size - 1) * size


def all_to_all_bytes(size: int, world_size: int) -> int:
    """The same when `size` bytes are dealt out evenly to all ranks."""
    return round((world_size - 1) * size / world_size)
