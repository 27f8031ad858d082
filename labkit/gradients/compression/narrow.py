"""A mean over ranks of numbers that travel in few bits, with a scale for each block of them.

| bits | what travels                                  | operation  |
|------|-----------------------------------------------|------------|
| 32   | the numbers as they are                       | all-reduce |
| 16   | bfloat16                                      | all-reduce |
| 8, 4 | whole numbers, fp32 scale for each BLOCK      | all-gather |

Rounding is stochastic, so the mean is right on average (Alistarh et al., QSGD, 2017).
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


def start_mean(values: Tensor, comm: Communicator, bits: Bits) -> Callable[[], Tensor]:
    """Start to average a flat tensor; calling the result waits and returns the mean, in the format of `values`."""
    if bits == 32:
        whole = comm.all_reduce(values.clone())
        return lambda: whole.wait().div_(comm.size)
    if bits == 16:
        half = comm.all_reduce(values.to(torch.bfloat16))
        return lambda: half.wait().to(values.dtype).div_(comm.size)
    coded = comm.all_gather(encode(values, bits))

    def finish() -> Tensor:
        total = torch.zeros_like(values)
        for payload in coded.wait():
            total += decode(payload, values.numel(), bits).to(values.dtype)
        return total.div_(comm.size)

    return finish


def mean_bytes(count: int, world_size: int, bits: Bits, width: int = 4) -> int:
    """What one rank sends for the mean of `count` numbers; `width`: bytes of one where they travel as they are."""
    if bits >= 16:
        return all_reduce_bytes(count * (width if bits == 32 else 2), world_size)
    blocks = -(-count // BLOCK)
    return all_gather_bytes(blocks * (BLOCK * bits // 8 + 4), world_size)


def encode(values: Tensor, bits: Bits) -> Tensor:
    """Bytes: the scales of the blocks, then whole numbers of `bits` bits, blocks filled up with zeros."""
    top = 2 ** (bits - 1) - 1
    blocks = torch.nn.functional.pad(values.float(), (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / top
    scaled = torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks))
    whole = torch.floor(scaled + torch.rand_like(scaled)).clamp_(-top, top).to(torch.int8).view(-1)
    return join_bytes(scale, pack((whole + 8).view(torch.uint8), 4) if bits == 4 else whole)


def decode(payload: Tensor, count: int, bits: Bits) -> Tensor:
    """The `count` numbers again, float32."""
    blocks = -(-count // BLOCK)
    scale, body = split_bytes(payload, [(blocks, torch.float32), (blocks * BLOCK * bits // 8, torch.int8)])
    whole = unpack(body.view(torch.uint8), blocks * BLOCK, range(-8, 8), torch.float32) if bits == 4 else body
    return (whole.view(-1, BLOCK) * scale[:, None]).reshape(-1)[:count]
