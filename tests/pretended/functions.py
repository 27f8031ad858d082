"""What Python says about devices: `device=`, `.to`, `.cuda`, `.cpu`, `.device`, `is_cuda`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tests.pretended.findings import FINDINGS, place
from tests.pretended.labels import CPU, CUDA, LABELS

FACTORIES = {
    *("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "eye", "tensor"),
    *("as_tensor", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_strided", "scalar_tensor"),
    *("sparse_csr_tensor", "from_file", "from_numpy", "frombuffer"),
}
FROM_HOST = {"tensor", "as_tensor", "new_tensor"}
"""Factories whose numbers come from a list of the host: a blocking copy if the tensor is on the GPU."""


class DeviceArguments(TorchFunctionMode):
    """Makes tensors on the GPU where code asks for it, and lets tensors tell their label."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.gpu = torch.device(CUDA, index)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "__get__":
            return self._attribute(func, args, kwargs)
        if name == "backward" and args:
            return self._backward(*args, **kwargs)
        if first is not None:
            if name == "to":
                return self._to(func, first, args[1:], kwargs)
            if name in ("cpu", "cuda"):
                return self._move(first, name, non_blocking=False)
            if name == "one_hot" and LABELS.of(first) == CUDA:
                return self._one_hot(func, first, args, kwargs)
            if name == "get_device":
                return self.gpu.index if LABELS.of(first) == CUDA else -1
            if name == "pin_memory":
                return first
            if name in ("tolist", "numpy") and LABELS.of(first) == CUDA:
                FINDINGS.wait(f"{name} copies to the host")
                if name == "numpy":
                    FINDINGS.fault("numpy is asked for a tensor of the GPU")
        if name in FACTORIES or "device" in kwargs:
            return self._make(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _attribute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return an attribute of a tensor."""
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        value = func(*args, **kwargs)
        if attribute == "device" and value.type == CPU and LABELS.of(args[0]) == CUDA:
            return self.gpu
        return LABELS.of(args[0]) == CUDA if attribute == "is_cuda" else value

    def _make(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function that may take `device=`, and label what it makes."""
        device = _type(kwargs.get("device"))
        if device == CUDA:
            kwargs["device"] = CPU
        out = func(*args, **kwargs)
        if device is None and name == "new_tensor":
            device = LABELS.of(args[0])
        if device == CUDA and name in FROM_HOST:
            FINDINGS.wait(f"torch.{name} copies numbers of the host")
        from_host = device is None and name in ("tensor", "as_tensor", "from_numpy", "frombuffer")
        if device is not None or (from_host and not any(isinstance(arg, Tensor) for arg in args)):
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    LABELS.put(tensor, device or CPU, place())
        return out

    def _one_hot(self, func: Any, tensor: Tensor, args: Any, kwargs: Any) -> Any:
        """Call `one_hot`, which C++ makes up of other operations; on a GPU it reads no number of its input."""
        counted, FINDINGS.in_step = FINDINGS.in_step, False
        LABELS.put(tensor, CPU)
        out = func(*args, **kwargs)
        for each in (tensor, out):
            LABELS.put(each, CUDA, place())
        FINDINGS.in_step = counted
        return out

    def _to(self, func: Any, tensor: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Convert and move a tensor."""
        copy = kwargs.pop("copy", False)
        memory_format = kwargs.pop("memory_format", torch.preserve_format)
        if args and isinstance(args[0], Tensor):
            device, dtype, non_blocking = LABELS.of(args[0]), args[0].dtype, False
        else:
            target, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
            if target is not None and target.type not in (CPU, CUDA):
                moved: Tensor = func(tensor, *args, **kwargs)
                return moved
            device = None if target is None else target.type
        out = tensor
        if dtype is not None and dtype != tensor.dtype:
            out = torch.ops.aten.to.dtype(tensor, dtype)
        if memory_format is not torch.preserve_format:
            out = out.contiguous(memory_format=memory_format)
        if device is not None and device != LABELS.of(out):
            return self._move(out, device, non_blocking)
        return out.clone() if copy and out is tensor else out

    def _move(self, tensor: Tensor, device: str, non_blocking: bool) -> Tensor:
        """Return a copy on the other device; the tensor itself if it is there already."""
        before = LABELS.of(tensor)
        if before == device:
            return tensor
        if device == CPU or not non_blocking:
            FINDINGS.wait(f"a copy from {before} to {device} blocks")
        recorded = tensor.requires_grad and torch.is_grad_enabled()
        copied: Tensor = _Move.apply(tensor, device) if recorded else tensor.detach().clone()  # type: ignore[no-untyped-call]
        LABELS.put(copied, device, place())
        return copied

    def _backward(self, tensors: Any, gradients: Any = None, **options: Any) -> None:
        """Run a backward pass whose first gradients are on the device of the losses."""
        losses = tensors if isinstance(tensors, list | tuple) else (tensors,)
        gradients = options.pop("gradient", options.pop("grad_tensors", gradients))
        seeds = list(gradients) if isinstance(gradients, list | tuple) else [gradients] * len(losses)
        for index, (loss, seed) in enumerate(zip(losses, seeds, strict=True)):
            if seed is None and loss.requires_grad and loss.numel() == 1:
                seeds[index] = torch.ones_like(loss)
            if seeds[index] is not None:
                LABELS.put(seeds[index], LABELS.of(loss))
        create, keep, inputs = (options.get(name) for name in ("create_graph", "retain_graph", "inputs"))
        inputs = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        with self:
            torch.autograd.graph._engine_run_backward(
                tuple(losses),
                tuple(seeds),
                bool(create) if keep is None else keep,
                bool(create),
                inputs,
                allow_unreachable=True,
                accumulate_grad=True,
            )


class _Move(torch.autograd.Function):
    """A copy to another device; the gradient comes back to the first one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: str) -> Tensor:
        ctx.device = LABELS.of(tensor)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        LABELS.put(gradient, ctx.device, place())
        return gradient, None


def _type(device: Any) -> str | None:
    """Return `cpu` or `cuda` of what `device=` was given; None for nothing and for other devices."""
    if device is None:
        return None
    kind = CUDA if isinstance(device, int) else torch.device(device).type
    return kind if kind in (CPU, CUDA) else None
