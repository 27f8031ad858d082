"""Small whole numbers packed into bytes, and several tensors into one message.

A digit of 1, 2 or 4 bits stands in a byte of its own before it is packed: 8, 4 or 2 of them, read as one integer, are
shifted together. Bytes lie in the order of little-endian machines, which is that of all that torch runs on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""Integers of 8 / bits bytes."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of so many digits."""
    return -(-count * bits // 8)


def pack(digits: Tensor, bits: int) -> Tensor:
    """Digits below 2**bits (uint8 or bool, [n]) as bytes (uint8, [ceil(n · bits / 8)]), zeros at the end."""
    per_byte = 8 // bits
    size = packed_bytes(len(digits), bits)
    if len(digits) < size * per_byte:
        padded = digits.new_zeros(size * per_byte)
        padded[: len(digits)] = digits
        digits = padded
    words = digits.view(torch.uint8).view(_WORDS[bits])
    found = words.clone()
    for place in range(1, per_byte):
        found |= words >> place * (8 - bits)  # from bit 8 · place to bit bits · place
    return (found & 0xFF).to(torch.uint8)


def unpack(packed: Tensor, count: int, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """What `count` packed digits stand for: digit d for values[d], of which there are 2, 4 or 16. Shape [count]."""
    bits = len(values).bit_length() - 1
    every_byte = torch.arange(256, device=packed.device)
    digits = torch.stack([every_byte >> place * bits & 2**bits - 1 for place in range(8 // bits)], dim=1)
    table = torch.tensor(values, dtype=dtype, device=packed.device)[digits]
    return table.index_select(0, packed.int()).view(-1)[:count]


def join_bytes(*parts: Tensor) -> Tensor:
    """One message of bytes."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def split_bytes(message: Tensor, like: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """The parts of a message again: `like` has their lengths and types."""
    sizes = [count * dtype.itemsize for count, dtype in like]
    parts = message.split(sizes)
    # A copy begins where any type may begin.
    return [part.clone().view(dtype) for part, (_, dtype) in zip(parts, like, strict=True)]


def pack_signs(rows: Tensor) -> Tensor:
    """Each row (of a multiple of 8 numbers) as its mean magnitude and its signs: uint8 [rows, 4 + width / 8]."""
    scales = rows.abs().mean(1, keepdim=True).float().view(torch.uint8)
    return torch.cat([scales, pack(rows.signbit().view(-1), 1).view(len(rows), -1)], dim=1)


def unpack_signs(messages: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The rows that such messages stand for: scale · sign, [rows, width]."""
    scales = messages[:, :4].flatten().clone().view(torch.float32)[:, None]
    numbers = unpack(messages[:, 4:].reshape(-1), len(messages) * width, (1.0, -1.0), dtype)
    return numbers.view(-1, width).mul_(scales)
