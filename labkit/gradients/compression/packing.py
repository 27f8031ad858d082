"""Packing of small integers into bytes, and of several tensors into one message.

A digit of 1, 2 or 4 bits takes a byte of its own before it is packed: 8, 4 or 2 of them, read as one integer, are
shifted together. The byte order is little-endian, which is that of all machines that torch runs on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""Integer dtypes of 8 / bits bytes, by bits."""


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` digits of `bits` bits take."""
    return -(-count * bits // 8)


def pack(digits: Tensor, bits: int) -> Tensor:
    """Pack digits below 2**bits (uint8 or bool, [n]) into bytes (uint8, [ceil(n · bits / 8)]), padded with zeros."""
    per_byte = 8 // bits
    size = packed_bytes(len(digits), bits)
    if len(digits) < size * per_byte:
        padded = digits.new_zeros(size * per_byte)
        padded[: len(digits)] = digits
        digits = padded
    words = digits.view(torch.uint8).view(_WORDS[bits])
    packed = words.clone()
    for index in range(1, per_byte):
        packed |= words >> index * (8 - bits)  # from bit 8 · index to bit bits · index
    return (packed & 0xFF).to(torch.uint8)


def unpack(packed: Tensor, count: int, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Unpack `count` digits and map digit d to values[d], of which there are 2, 4 or 16; the shape is [count]."""
    return _table(tuple(values), dtype, packed.device).index_select(0, packed.int()).view(-1)[:count]


@lru_cache(maxsize=64)
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the values of the digits in every byte, shape [256, digits per byte].

    It is kept: the numbers come from the host, and copying them to a GPU makes the host wait for it.
    """
    bits = len(values).bit_length() - 1
    every_byte = torch.arange(256, device=device)
    digits = torch.stack([every_byte >> index * bits & 2**bits - 1 for index in range(8 // bits)], dim=1)
    return torch.tensor(values, dtype=dtype, device=device)[digits]


def join_bytes(*parts: Tensor) -> Tensor:
    """Concatenate tensors into one message of bytes (uint8)."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def split_bytes(message: Tensor, like: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Split a message into its tensors; `like` has their lengths and dtypes."""
    sizes = [count * dtype.itemsize for count, dtype in like]
    parts = message.split(sizes)
    # A copy is aligned for any dtype.
    return [part.clone().view(dtype) for part, (_, dtype) in zip(parts, like, strict=True)]


def pack_signs(rows: Tensor) -> Tensor:
    """Encode each row (a multiple of 8 elements) as its mean magnitude and its signs: uint8 [rows, 4 + width / 8]."""
    scales = rows.abs().mean(1, keepdim=True).float().view(torch.uint8)
    return torch.cat([scales, pack(rows.signbit().view(-1), 1).view(len(rows), -1)], dim=1)


def unpack_signs(messages: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Decode what `pack_signs` returned: scale · sign, shape [rows, width]."""
    scales = messages[:, :4].flatten().clone().view(torch.float32)[:, None]
    signs = unpack(messages[:, 4:].reshape(-1), len(messages) * width, (1.0, -1.0), dtype)
    return signs.view(-1, width).mul_(scales)
