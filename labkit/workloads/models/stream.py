"""The residual stream of a transformer: the sum that passes through all layers, to which each of them adds."""

import torch
from torch import Tensor


def in_stream_dtype(x: Tensor) -> Tensor:
    """Return `x` in the dtype of the stream: bfloat16 where autocast computes products in bfloat16.

    The embedding's result would stay in float32, and with it every sum of the stream, which would read and write twice
    the memory and send twice the bytes between stages of a pipeline and tensor-parallel ranks. Norms still compute in
    float32. Under autocast to float16 the stream stays in float32: sums of many layers may exceed float16's range.
    """
    device = x.device.type
    if device == "meta" or x.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.bfloat16) if torch.get_autocast_dtype(device) == torch.bfloat16 else x
