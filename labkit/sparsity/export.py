"""Export of a trained network in a form that exploits its zeros at inference: conversion, saving and loading.

| form     | a linear layer with zeros becomes                                             | where              |
|----------|-------------------------------------------------------------------------------|--------------------|
| dense    | the same layer, which multiplies the zeros                                    | everywhere         |
| csr      | values, column indices and row offsets, where that was measured to be faster  | CPUs               |
| smaller  | a dense layer without the units that were pruned (structured sparsity)        | everywhere         |
| dense_16 | a dense layer in bfloat16, with which two_four is compared                    | where two_four is  |
| two_four | two of four weights and their indices, multiplied in bfloat16                 | GPUs with kernels  |

All but the last two compute the same up to rounding in float32. A file contains safetensors and JSON, no code:

    model = task.model                                          # newly built, from any seed
    load(run.directory.exported, model)
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from labkit.experiment import safe_files
from labkit.experiment.tensor_files import save_file
from labkit.sparsity import two_four
from labkit.sparsity.csr import CsrLinear, Pattern, count_rows, csr_matrix
from labkit.sparsity.structured import shrink, units_of

FORMAT = 1
REPEATS = 5
"""Timed passes per layer."""
HOPELESS = 2
"""A layer whose passes are all slower than the slowest one of its competitor by this factor is not timed further."""


class CsrInference(nn.Module):
    """Replaces an `nn.Linear` ([..., inputs] to [..., outputs]) by its non-zero weights; for inference only.

    `values` have the dtype of the layer; `columns` has the column of each value and `ends` [outputs + 1] the row
    offsets, both as int32.
    """

    values: Tensor
    columns: Tensor
    ends: Tensor
    bias: Tensor | None

    def __init__(self, values: Tensor, columns: Tensor, ends: Tensor, bias: Tensor | None, in_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, len(ends) - 1
        for name, tensor in (("values", values), ("columns", columns), ("ends", ends), ("bias", bias)):
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, layer: nn.Linear) -> CsrInference:
        """Build it from a layer's non-zero weights."""
        weight = layer.weight.detach()
        matrix = Pattern(weight != 0).matrix(weight[weight != 0])
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(matrix.values(), matrix.col_indices(), matrix.crow_indices(), bias, layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        columns = x.reshape(-1, self.in_features).t().contiguous()
        matrix = csr_matrix(self.ends, self.columns, self.values, (self.out_features, self.in_features))
        # Contiguous like a dense layer's output, so that the next operation does not lose what this layer gains.
        out = (matrix @ columns).t().contiguous()
        out = out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out
        return out if self.bias is None else out.add_(self.bias)


class HalfLinear(nn.Module):
    """Replaces an `nn.Linear` ([..., inputs] to [..., outputs]) by one in bfloat16, by 2:4 kernels if `sparse`."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, sparse: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        half = weight.detach().to(torch.bfloat16)
        self.packed = two_four.compress(half) if sparse else None
        if sparse:  # registered so that its memory is counted
            parts = {name: getattr(self.packed, name) for name in ("packed", "meta")}
            for name, tensor in parts.items():
                self.register_buffer(f"held_{name}", tensor, persistent=False)
        else:
            self.register_buffer("weight", half)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        half = x.to(torch.bfloat16).flatten(0, -2).contiguous()
        out = functional.linear(half, self.weight if self.packed is None else self.packed)
        out = out.to(x.dtype).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias

    def to_dense(self) -> Tensor:
        """Return the weight with its zeros [outputs, inputs]."""
        return self.weight if self.packed is None else self.packed.to_dense()


# -- forms ------------------------------------------------------------------------------------------------------------


def densify(model: nn.Module) -> None:
    """Replace layers that train with sparse kernels by `nn.Linear` layers, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CsrLinear):
            replace_module(model, name, make_linear(module.pattern.to_dense(module.weight), module.bias))
        elif isinstance(module, two_four.SemiStructuredLinear):
            replace_module(model, name, make_linear(module.weight, module.bias))


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Build an `nn.Linear` from a weight [outputs, inputs] and a bias [outputs]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return layer


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the submodule called `name` by `layer`."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def layers_with_zeros(model: nn.Module) -> list[str]:
    """Return the names of the linear layers whose weight has zeros and is not tied."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    layers = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    return [name for name, layer in layers if name and uses[id(layer.weight)] == 1 and bool((layer.weight == 0).any())]


def faster_as_csr(model: nn.Module, x: Tensor, heartbeat: Callable[[], None] = lambda: None) -> list[str]:
    """Return the names of the layers with zeros that are faster as CSR for the input `x`, as measured here.

    `heartbeat` is called again and again while it measures.
    """
    if x.is_cuda:
        return []  # torch's sparse products are slower than dense ones there
    names = layers_with_zeros(model)
    rows = count_rows(model, [f"{name}.weight" for name in names], x)
    is_faster: dict[tuple[int, ...], bool] = {}
    faster = []
    for name in names:
        layer, count = model.get_submodule(name), rows.get(f"{name}.weight", 0)
        assert isinstance(layer, nn.Linear)
        key = (*layer.weight.shape, int(layer.weight.count_nonzero()), count)
        if key not in is_faster:
            is_faster[key] = count > 0 and _is_faster(CsrInference.of(layer), layer, count, heartbeat)
        faster += [name] if is_faster[key] else []
    return faster


def _is_faster(candidate: nn.Module, baseline: nn.Linear, rows: int, heartbeat: Callable[[], None]) -> bool:
    """Return whether the candidate's median time for `rows` rows is below the baseline's; they are timed in turns."""
    x = baseline.weight.detach().new_zeros(rows, baseline.in_features)
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for turn in range(1 + REPEATS):
            for layer, times in zip((candidate, baseline), seconds, strict=True):
                heartbeat()
                begun = time.perf_counter()
                layer(x)
                if turn:  # the first pass is a warm-up
                    times.append(time.perf_counter() - begun)
            if turn > 1 and min(seconds[0]) > HOPELESS * max(seconds[1]):
                return False
    return statistics.median(seconds[0]) < statistics.median(seconds[1])


def as_csr(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return a copy in which these layers hold their non-zero weights only."""
    copy = deepcopy(model)
    for name in names:
        layer = copy.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        replace_module(copy, name, CsrInference.of(layer))
    return copy


def as_smaller(model: nn.Module) -> nn.Module:
    """Return a copy without the hidden units and heads whose weights are all zero."""
    return shrink(deepcopy(model))


def as_half(model: nn.Module, names: Iterable[str], sparse: bool) -> nn.Module:
    """Return a copy with these layers in bfloat16, by 2:4 kernels if `sparse`."""
    copy = deepcopy(model)
    for name in names:
        layer = copy.get_submodule(name)
        replace_module(copy, name, HalfLinear(layer.weight, layer.bias, sparse))  # type: ignore[arg-type]
    return copy


def layers_with_two_four(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that 2:4 kernels can compute; [] if there are no such kernels."""
    if two_four.kernels(next(model.parameters()).device)[0] is None:
        return []
    weights = {name: model.get_parameter(f"{name}.weight") for name in layers_with_zeros(model)}
    return [name for name, weight in weights.items() if two_four.fits(weight) and two_four.is_two_four(weight)]


# -- files ------------------------------------------------------------------------------------------------------------


def save(path: Path, model: nn.Module, form: str) -> int:
    """Write a model in one of the forms and return the bytes of the file, which is either complete or absent."""
    layers = dict(model.named_modules())
    csr = {name: layer.in_features for name, layer in layers.items() if isinstance(layer, CsrInference)}
    half = {name: layer for name, layer in layers.items() if isinstance(layer, HalfLinear)}
    about = {"format": FORMAT, "form": form, "csr": csr, "half": sorted(half)}
    persistent = model.state_dict().keys()
    named = [
        *model.named_parameters(),
        *((name, buffer) for name, buffer in model.named_buffers() if name in persistent),
    ]
    tensors = dict(named) | {f"{name}.weight": layer.to_dense() for name, layer in half.items()}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, {"labkit": json.dumps(about)})
    os.replace(partial, path)
    return path.stat().st_size


def load(path: str | Path, model: nn.Module) -> str:
    """Load an exported network into a newly built model, in place, on its device; return the name of the form.

    The model then computes what the exported one did. Raises ValueError if the file is not an export, is damaged or
    belongs to another model; the model is then unusable.
    """
    device = next(model.parameters()).device
    try:
        safe_files.size(Path(path))  # a regular file, not a link or a pipe
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})["labkit"])
            if about["format"] != FORMAT:
                raise ValueError("it comes from another version of labkit")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not iterable)
        _fill(model, tensors, about)
        return str(about["form"])
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is not an exported network of this model: {error}") from error


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    for name, in_features in about["csr"].items():
        values, columns, ends = (tensors.pop(f"{name}.{part}") for part in ("values", "columns", "ends"))
        bias = tensors.pop(f"{name}.bias", None)
        layer: Any = model.get_submodule(name)
        # The only check: products do not validate column indices.
        torch.sparse_csr_tensor(ends, columns, values, (len(ends) - 1, in_features), check_invariants=True)
        if (layer.in_features, layer.out_features) != (in_features, len(ends) - 1):
            raise ValueError(f"{name} has another shape")
        replace_module(model, name, CsrInference(values, columns, ends, bias, in_features))
    for name in about["half"]:
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
        if model.get_parameter(f"{name}.weight").shape != weight.shape:
            raise ValueError(f"{name} has another shape")
        sparse = about["form"] == "two_four" and two_four.kernels(weight.device)[0] is not None
        replace_module(model, name, HalfLinear(weight, bias, sparse and two_four.is_two_four(weight)))
    replaced = (*about["csr"], *about["half"])
    present = dict(model.named_parameters()) | dict(model.named_buffers())
    expected = {name for name in present if name.rpartition(".")[0] not in replaced and name in model.state_dict()}
    if expected != set(tensors):
        raise ValueError(f"missing or unexpected tensors: {', '.join(sorted(expected ^ set(tensors))[:5])}")
    for name, tensor in tensors.items():
        if present[name].shape == tensor.shape:
            present[name].copy_(tensor)
        else:
            _resize(model, name, tensor)
    for units in units_of(model) if about["form"] == "smaller" else []:
        dimensions = {len(model.get_parameter(name)) for name in units.into} | {model.get_parameter(units.out).shape[1]}
        if len(dimensions) > 1:
            raise ValueError(f"{units.out} does not fit the layers before it")


def _resize(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter of a linear layer by a smaller one."""
    path, _, attribute = name.rpartition(".")
    layer = model.get_submodule(path)
    if type(layer) is not nn.Linear or any(
        a > b for a, b in zip(tensor.shape, getattr(layer, attribute).shape, strict=True)
    ):
        raise ValueError(f"{name} has another shape")
    setattr(layer, attribute, nn.Parameter(tensor))
    if attribute == "weight":
        layer.out_features, layer.in_features = tensor.shape
