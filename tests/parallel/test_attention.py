"""Attention over parts of the keys: each kernel beside torch's own attention over all of them. On the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from labkit.parallel.attention import Dense, Flash, FlashOnCpu, Kernel, Part, kernel_for
from labkit.parallel.context import _merge

SCALE = 0.3
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-2}


def sample(dtype: torch.dtype, length: int = 24, head: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(2, 3, length, head, dtype=dtype) for _ in range(4))
    return query, key, value, grad


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kernel", [FlashOnCpu(), Dense()], ids=lambda kernel: type(kernel).__name__)
def test_a_causal_block_is_torchs_attention(kernel: Kernel, dtype: torch.dtype) -> None:
    query, key, value, grad = sample(dtype)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    expected = scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE)
    expected.backward(grad)
    out, log_sum = kernel.forward(Part(query, key, value, True, SCALE))
    assert log_sum.dtype == torch.promote_types(dtype, torch.float32)
    close(out, expected, dtype)
    gradients = kernel.backward(Part(query, key, value, True, SCALE), grad, out, log_sum)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        close(gradient, leaf.grad, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kernel", [FlashOnCpu(), Dense()], ids=lambda kernel: type(kernel).__name__)
def test_parts_of_the_keys_merge_to_the_whole(kernel: Kernel, dtype: torch.dtype) -> None:
    query, key, value, grad = sample(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total, log_sum = torch.zeros_like(query, dtype=wide), torch.full(query.shape[:-1], -torch.inf, dtype=wide)
    slices = slice(0, 5), slice(5, 24)  # of unequal length
    parts = [Part(query, key[:, :, some], value[:, :, some], False, SCALE) for some in slices]
    for part in parts:
        _merge(total, log_sum, *kernel.forward(part))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    expected = scaled_dot_product_attention(*leaves, scale=SCALE)
    expected.backward(grad)
    out = total.to(dtype)
    close(out, expected, dtype)
    of_parts = [kernel.backward(part, grad, out, log_sum) for part in parts]
    close(sum(gradients[0] for gradients in of_parts), leaves[0].grad, dtype)
    for index in (1, 2):
        close(torch.cat([gradients[index] for gradients in of_parts], 2), leaves[index].grad, dtype)


def close(actual: object, expected: object, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "head", "kernel"),
    [
        (torch.bfloat16, 64, Flash),
        (torch.float16, 128, Flash),
        (torch.bfloat16, 60, Dense),
        (torch.bfloat16, 264, Dense),
        (torch.float32, 64, Dense),
        (torch.float64, 64, Dense),
    ],
    ids=str,
)
def test_kernels_of_a_gpu_give_shapes_and_dtypes(dtype: torch.dtype, head: int, kernel: type) -> None:
    """Fake tensors have a device and a shape but no values: they show that torch takes the arguments."""
    with FakeTensorMode():
        query, key, value, grad = (torch.empty(2, 3, 24, head, dtype=dtype, device="cuda") for _ in range(4))
        chosen = kernel_for(query)
        assert type(chosen) is kernel
        out, log_sum = chosen.forward(Part(query, key, value, True, SCALE))
        assert (out.shape, out.dtype) == (query.shape, dtype)
        assert (log_sum.shape, log_sum.dtype) == (query.shape[:-1], torch.promote_types(dtype, torch.float32))
        gradients = chosen.backward(Part(query, key, value, True, SCALE), grad, out, log_sum)
        assert [(x.shape, x.dtype) for x in gradients] == [(query.shape, dtype)] * 3
