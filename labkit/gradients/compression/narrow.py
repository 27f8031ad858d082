"""The mean over ranks of values that are sent in few bits, with a scale for each block of them.

| bits | what is sent                                  | operation  |
|------|-----------------------------------------------|------------|
| 32   | the values as they are                        | all-reduce |
| 16   | bfloat16                                      | all-reduce |
| 8, 4 | integers, and an fp32 scale for each BLOCK    | all-gather |

Rounding is stochastic, so the mean is unbiased (Alistarh et al., QSGD, 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from labkit.gradients.compression.packing import join_bytes, pack, split_bytes, unpack
from labkit.gradients.cost import all_gather_bytes, all_reduce_bytes
from labkit.gradients.wire import Communicator

Bits = Literal[32, 16, 8, 4]
BLOCK = 1024
"""Values that share a scale."""


def start_mean(values: Tensor, comm: Communicator, bits: Bits) -> Callable[[], Tensor]:
    """Start to average a flat tensor; calling the result waits and returns the mean, in the dtype of `values`."""
    if bits == 32:
        full = comm.all_reduce(values.clone())
        return lambda: full.wait().div_(comm.size)
    if bits == 16:
        half = comm.all_reduce(values.to(torch.bfloat16))
        return lambda: half.wait().to(values.dtype).div_(comm.size)
    encoded = comm.all_gather(encode(values, bits))

    def finish() -> Tensor:
        total = torch.zeros_like(values)
        for payload in encoded.wait():
            total += decode(payload, values.numel(), bits).to(values.dtype)
        return total.div_(comm.size)

    return finish


def mean_bytes(count: int, world_size: int, bits: Bits, width: int = 4) -> int:
    """Return the bytes that one rank sends to average `count` values; `width` is the bytes of an unencoded value."""
    if bits >= 16:
        return all_reduce_bytes(count * (width if bits == 32 else 2), world_size)
    blocks = -(-count // BLOCK)
    return all_gather_bytes(blocks * (BLOCK * bits // 8 + 4), world_size)


def encode(values: Tensor, bits: Bits) -> Tensor:
    """Encode values as bytes: the scales of all blocks, then integers of `bits` bits; blocks are padded with zeros."""
    top = 2 ** (bits - 1) - 1
    blocks = torch.nn.functional.pad(values.float(), (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / top
    scaled = torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks))
    codes = torch.floor(scaled + torch.rand_like(scaled)).clamp_(-top, top).to(torch.int8).view(-1)
    return join_bytes(scale, pack((codes + 8).view(torch.uint8), 4) if bits == 4 else codes)


def decode(payload: Tensor, count: int, bits: Bits) -> Tensor:
    """Decode the first `count` values of what `encode` returned, as float32."""
    blocks = -(-count // BLOCK)
    scale, body = split_bytes(payload, [(blocks, torch.float32), (blocks * BLOCK * bits // 8, torch.int8)])
    codes = unpack(body.view(torch.uint8), blocks * BLOCK, range(-8, 8), torch.float32) if bits == 4 else body
    return (codes.view(-1, BLOCK) * scale[:, None]).reshape(-1)[:count]
