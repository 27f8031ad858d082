"""The model FLOPs of one sample: three times the products of one forward pass of the whole model.

This is the usual convention (PaLM, arXiv:2204.02311, appendix B): the backward pass has twice the products of the
forward pass. What a run does besides is not counted: recomputed activations, element-wise operations, the optimizer.
Causal attention counts in full, sparse or low-precision layers count like dense ones, and frozen weights like trained
ones, so that the figure belongs to the model and runs can be compared.

torch's counter knows the kernels of attention on GPUs only, and few recurrent ones; the missing formulas are here, so
that CPUs and GPUs count the same.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from labkit.experiment.fault import describe_error

PASSES = 3
"""A forward pass, and a backward pass with twice as many products."""
_NAMESPACES = ("aten", "prim", "prims", "profiler", "inductor")
"""Namespaces of operations whose products the counter knows."""
_UNKNOWN = (
    *("_trilinear", "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_cslt_sparse_mm"),
    *("_weight_int4pack_mm", "_weight_int8pack_mm", "miopen_rnn"),
)
"""Operations of torch that contain products for which there is no formula."""

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **options: Any) -> int:
    """Return the FLOPs of attention: all scores count, also those that a causal mask hides."""
    return int(sdpa_flop_count(query, key, value))


def _matrix(matrix: Shape, *args: Any, **options: Any) -> int:
    """Return the FLOPs of a matrix, or a vector, times a vector."""
    return 2 * prod(matrix)


def _add_matrix(bias: Shape, matrix: Shape, *args: Any, **options: Any) -> int:
    """Return the FLOPs of a matrix times a vector, to which a vector is added."""
    return 2 * prod(matrix)


def _rows(left: Shape, right: Shape, *args: Any, **options: Any) -> int:
    """Return the FLOPs of rows [m, k], or [e, m, k], times a matrix [k, n], or that of their group [e, k, n]."""
    return 2 * prod(left) * right[-1]


def _rnn_layer(x: Shape, from_input: Shape, from_state: Shape, *args: Any, **options: Any) -> int:
    """Return the FLOPs of one recurrent layer, whose two matrices are applied to every element of a sequence."""
    return 2 * prod(x[:-1]) * (prod(from_input) + prod(from_state))


def _rnn(x: Shape, weights: list[Shape], *args: Any, **options: Any) -> int:
    """Return the FLOPs of a whole recurrent network."""
    return 2 * prod(x[:-1]) * sum(prod(shape) for shape in weights if len(shape) > 1)


_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "mv": _matrix,
    "dot": _matrix,
    "vdot": _matrix,
    "addmv": _add_matrix,
    "_grouped_mm": _rows,
    "_int_mm": _rows,
    "mkldnn_rnn_layer": _rnn_layer,
    "_cudnn_rnn": _rnn,
}
"""Formulas of operations by name, in addition to torch's own."""


class _UnknownProducts(TorchDispatchMode):
    """Dispatch mode that names an operation whose products cannot be counted."""

    operation = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name  # such as `aten::mm`
        namespace, _, operation = name.partition("::")
        if namespace not in _NAMESPACES or operation in _UNKNOWN:
            self.operation = self.operation or name
        return func(*args, **(kwargs or {}))


def count_model_flops(forward: Callable[[], int]) -> tuple[int | None, str]:
    """Return the model FLOPs of one sample, and "" or one sentence that says why they cannot be counted.

    `forward` runs one forward pass of the whole model and returns its number of samples.
    """
    unknown = _UnknownProducts()  # type: ignore[no-untyped-call]
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), unknown, counter:
            samples = forward()
    except Exception as error:  # a model that trains may still refuse to be counted
        return None, _sentence(describe_error(error))
    flops = PASSES * counter.get_total_flops()
    if unknown.operation:
        return None, _sentence(f"the products inside {unknown.operation} are unknown")
    if not flops:
        return None, _sentence("its forward pass has no matrix product")
    return flops // samples, ""


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return the formulas by the operations that this version of torch has."""
    present = ((getattr(torch.ops.aten, name, None), formula) for name, formula in _FORMULAS.items())
    return {operation: formula for operation, formula in present if operation is not None}


def _sentence(reason: str) -> str:
    return f"the model FLOPs are not known, so there is neither a rate nor an MFU: {reason}"
