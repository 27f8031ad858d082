"""Every operation of torch, seen below autograd: its result is on the device of its inputs, and these must be one."""

from __future__ import annotations

import linecache
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.pretended.findings import FINDINGS, PACKAGE, place
from tests.pretended.groups import PREFIX, Groups
from tests.pretended.labels import CPU, CUDA, LABELS

aten = torch.ops.aten
MAY_MIX = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,  # a GPU's tensor may be indexed by the host's
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten.set_.source_Storage,
    aten._foreach_copy_.default,
}
MAY_MIX_NAMES = ("aten::_fused", "aten::_foreach", "_c10d")
"""Steps of an optimizer may be counted on the host."""
WAITS = {
    aten._local_scalar_dense.default: "a number is read (item)",
    aten.is_nonzero.default: "a number is read (item)",
    aten.nonzero.default: "nonzero counts its results",
    aten.bincount.default: "bincount counts its results",
    aten._unique2.default: "unique counts its results",
    aten.unique_dim.default: "unique counts its results",
    aten.masked_select.default: "masked_select counts its results",
    aten.equal.default: "equal reads its result",
    aten.repeat_interleave.Tensor: "repeat_interleave counts its results",
}
"""Operations after which the host has to know a result."""


_BETWEEN = ("/tests/pretended/", "/torch/_compile", "/torch/_dynamo/", "/torch/utils/_python_dispatch", "/traffic.py")
"""Files of the frames between the code that calls an operation and this one."""


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any, scale: float) -> Any:
    dropout, causal = options[:2] or (0.0, False)  # torch leaves out what has its default value
    out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, causal, scale=scale)
    return out, log_sum, None, None, query.shape[-2], key.shape[-2], log_sum.new_empty(2), log_sum.new_empty(0), None


def _flash_attention_backward(*args: Any, scale: float) -> Any:
    tensors, dropout, causal = args[:6], args[10], args[11]
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, dropout, causal, scale=scale)


STAND_INS = {
    aten._scaled_dot_product_flash_attention.default: _flash_attention,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_attention_backward,
}
"""Kernels for GPUs only, and what computes the same on the CPU."""


class LabeledOperations(TorchDispatchMode):
    """Labels the results of all operations, and notes what a GPU would refuse or wait for."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self._groups = groups
        self.allocates_on_gpu = 0
        """Above 0 inside code in C++ that allocates on the device of its parameters."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = [LABELS.of(tensor) for tensor in inputs]
        if func._schema.name.startswith(PREFIX):
            self._groups.judge(func, args)
        elif CUDA in devices:
            _judge(func, args, kwargs, inputs, devices)
        out = STAND_INS.get(func, func)(*args, **kwargs)
        if func is not aten.copy_.default:
            self._label(out, inputs, devices)
        return out

    def _label(self, out: Any, inputs: list[Tensor], devices: list[str]) -> None:
        """Label what the operation has allocated with the device of its inputs."""
        made_by_engine = not inputs and (self.allocates_on_gpu or _is_autograd_engine())
        if CUDA in devices or made_by_engine:
            known = {id(tensor) for tensor in inputs}
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and id(tensor) not in known:
                    LABELS.put(tensor, CUDA, place())


def _judge(func: Any, args: Any, kwargs: Any, inputs: list[Tensor], devices: list[str]) -> None:
    """Note what a GPU would refuse, or wait for, in an operation that has a tensor of the GPU among its inputs."""
    whole = {device for tensor, device in zip(inputs, devices, strict=True) if tensor.dim() and tensor.numel()}
    name = func._schema.name
    if CPU in whole and func not in MAY_MIX and not name.startswith(MAY_MIX_NAMES):
        shapes = [f"{device} {list(t.shape)}" for t, device in zip(inputs, devices, strict=True)]
        FINDINGS.fault(f"{name} has inputs on both devices ({', '.join(shapes)})")
    if func is aten.index.Tensor and devices[0] == CPU:
        FINDINGS.fault("a tensor of the host is indexed by one of the GPU")
    if func in WAITS:
        FINDINGS.wait(WAITS[func])
    if func in (aten.index.Tensor, aten.index_put_.default) and _has_mask(args[1]):
        FINDINGS.wait("indexing by a mask counts its results")
    if func is aten.copy_.default and len(devices) > 1 and devices[0] != devices[1]:
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if (devices[0] == CPU or not non_blocking) and not _is_gloo():
            FINDINGS.wait(f"a copy from {devices[1]} to {devices[0]} blocks")


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in tree_leaves(indices))


def _is_gloo() -> bool:
    """Return whether a message is being sent or waited for: gloo copies from memory of its own, NCCL does not."""
    frame: Any = sys._getframe(1)
    while frame is not None and any(part in frame.f_code.co_filename for part in _BETWEEN):
        frame = frame.f_back
    line = "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return any(word in line for word in (".wait(", "wait_tensor", "reduce_scatter", "work ="))


def _is_autograd_engine() -> bool:
    """Return whether the innermost line of labkit is a backward pass, in which torch's own code makes this tensor."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return "backward(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return False
