"""The trained network in a form that makes use of its zeros, for inference; written to a file and read from it.

| form     | what becomes of a linear layer with zeros                                     | where              |
|----------|-------------------------------------------------------------------------------|--------------------|
| dense    | it stays: zeros are multiplied                                                | everywhere         |
| csr      | values, columns and row ends, in layers for which that was measured as faster | CPUs               |
| smaller  | an ordinary layer without the units that went (structured sparsity)           | everywhere         |
| dense_16 | an ordinary layer in bfloat16: what the next one has to beat                  | with the next one  |
| two_four | two of four weights and their places, multiplied in bfloat16                  | GPUs with kernels  |

All but the last two compute the same up to rounding in float32. A file holds safetensors and JSON, nothing that is run:

    model = task.model                                          # built anew, from any seed
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
from labkit.sparsity.csr import CsrLinear, Pattern, csr_matrix, rows_seen
from labkit.sparsity.structured import shrink, units_of

FORMAT = 1
REPEATS = 5
HOPELESS = 2
"""So many times as long as the other's longest pass: it is not tried again."""


class CsrInference(nn.Module):
    """In place of an `nn.Linear`: [..., inputs] to [..., outputs] with its non-zero weights; never trained.

    `values` in the type of the layer, `columns` of each value and `ends` [outputs + 1], where each row ends, as int32.
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
        """The weights of a layer that are not zero."""
        weight = layer.weight.detach()
        matrix = Pattern(weight != 0).matrix(weight[weight != 0])
        bias = None if layer.bias is None else layer.bias.detach()
        return cls(matrix.values(), matrix.col_indices(), matrix.crow_indices(), bias, layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        columns = x.reshape(-1, self.in_features).t().contiguous()
        matrix = csr_matrix(self.ends, self.columns, self.values, (self.out_features, self.in_features))
        # Laid out as a dense layer's: the next operation shall not pay for what this layer gains.
        out = (matrix @ columns).t().contiguous()
        out = out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out
        return out if self.bias is None else out.add_(self.bias)


class HalfLinear(nn.Module):
    """In place of an `nn.Linear`: [..., inputs] to [..., outputs] in bfloat16, as 2:4 where it is `sparse`."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, sparse: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        half = weight.detach().to(torch.bfloat16)
        self.packed = two_four.compressed(half) if sparse else None
        if sparse:  # what lies in memory, to be counted
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

    def whole(self) -> Tensor:
        """The weight with its zeros [outputs, inputs]."""
        return self.weight if self.packed is None else self.packed.to_dense()


# -- forms ------------------------------------------------------------------------------------------------------------


def ordinary(model: nn.Module) -> None:
    """Put ordinary layers in the place of those that train with kernels of their own, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CsrLinear):
            put(model, name, linear(module.pattern.spread(module.weight), module.bias))
        elif isinstance(module, two_four.SemiStructuredLinear):
            put(model, name, linear(module.weight, module.bias))


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of these tensors [outputs, inputs] and [outputs]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        made.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return made


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer where another one stands."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def with_zeros(model: nn.Module) -> list[str]:
    """Names of the linear layers that have zeros, and whose weight stands nowhere else."""
    places: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    layers = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    return [
        name for name, layer in layers if name and places[id(layer.weight)] == 1 and bool((layer.weight == 0).any())
    ]


def faster_as_csr(model: nn.Module, x: Tensor, alive: Callable[[], None] = lambda: None) -> list[str]:
    """Those of them that are faster with their non-zero weights only when the model is given `x`, as measured here.

    `alive` is called again and again meanwhile.
    """
    if x.is_cuda:
        return []  # torch's sparse products are slower than dense ones there
    names = with_zeros(model)
    rows = rows_seen(model, [f"{name}.weight" for name in names], x)
    known: dict[tuple[int, ...], bool] = {}
    found = []
    for name in names:
        layer, seen = model.get_submodule(name), rows.get(f"{name}.weight", 0)
        assert isinstance(layer, nn.Linear)
        kind = (*layer.weight.shape, int(layer.weight.count_nonzero()), seen)
        if kind not in known:
            known[kind] = seen > 0 and _faster(CsrInference.of(layer), layer, seen, alive)
        found += [name] if known[kind] else []
    return found


def _faster(one: nn.Module, other: nn.Linear, rows: int, alive: Callable[[], None]) -> bool:
    """Is the median of one's passes over so many rows below that of the other's? They take turns."""
    x = other.weight.detach().new_zeros(rows, other.in_features)
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for turn in range(1 + REPEATS):
            for layer, found in zip((one, other), seconds, strict=True):
                alive()
                begun = time.perf_counter()
                layer(x)
                if turn:  # the first pass prepares things
                    found.append(time.perf_counter() - begun)
            if turn > 1 and min(seconds[0]) > HOPELESS * max(seconds[1]):
                return False
    return statistics.median(seconds[0]) < statistics.median(seconds[1])


def as_csr(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy with the non-zero weights only of these layers."""
    made = deepcopy(model)
    for name in names:
        layer = made.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        put(made, name, CsrInference.of(layer))
    return made


def as_smaller(model: nn.Module) -> nn.Module:
    """A copy without hidden units and heads whose weights are all zero."""
    return shrink(deepcopy(model))


def as_half(model: nn.Module, names: Iterable[str], sparse: bool) -> nn.Module:
    """A copy with these layers in bfloat16, as they are or 2:4."""
    made = deepcopy(model)
    for name in names:
        layer = made.get_submodule(name)
        put(made, name, HalfLinear(layer.weight, layer.bias, sparse))  # type: ignore[arg-type]
    return made


def with_two_four(model: nn.Module) -> list[str]:
    """Names of the linear layers whose weights a kernel for 2:4 takes; none where there is no such kernel."""
    if two_four.kernels(next(model.parameters()).device)[0] is None:
        return []
    weights = {name: model.get_parameter(f"{name}.weight") for name in with_zeros(model)}
    return [name for name, weight in weights.items() if two_four.fits(weight) and two_four.is_two_four(weight)]


# -- files ------------------------------------------------------------------------------------------------------------


def save(path: Path, model: nn.Module, form: str) -> int:
    """Write a model in one of the forms; the bytes of the file, which is complete or absent."""
    layers = dict(model.named_modules())
    csr = {name: layer.in_features for name, layer in layers.items() if isinstance(layer, CsrInference)}
    half = {name: layer for name, layer in layers.items() if isinstance(layer, HalfLinear)}
    about = {"format": FORMAT, "form": form, "csr": csr, "half": sorted(half)}
    kept = model.state_dict().keys()
    named = [*model.named_parameters(), *((name, one) for name, one in model.named_buffers() if name in kept)]
    tensors = dict(named) | {f"{name}.weight": layer.whole() for name, layer in half.items()}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, {"labkit": json.dumps(about)})
    os.replace(partial, path)
    return path.stat().st_size


def load(path: str | Path, model: nn.Module) -> str:
    """Put what was exported into a freshly built model, in place, on its device; the form's name.

    The model computes then what the exported one did. ValueError where the file is none of ours, damaged, or of another
    model; the model is of no use then.
    """
    device = next(model.parameters()).device
    try:
        safe_files.size(Path(path))  # a regular file, not a link or a pipe
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {})["labkit"])
            if about["format"] != FORMAT:
                raise ValueError("it comes from another version of labkit")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no iterable)
        _fill(model, tensors, about)
        return str(about["form"])
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is no exported network, or not one of this model: {error}") from error


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    for name, in_features in about["csr"].items():
        values, columns, ends = (tensors.pop(f"{name}.{part}") for part in ("values", "columns", "ends"))
        bias = tensors.pop(f"{name}.bias", None)
        layer: Any = model.get_submodule(name)
        # The one check: products do not look where columns point.
        torch.sparse_csr_tensor(ends, columns, values, (len(ends) - 1, in_features), check_invariants=True)
        if (layer.in_features, layer.out_features) != (in_features, len(ends) - 1):
            raise ValueError(f"{name} has other sides")
        put(model, name, CsrInference(values, columns, ends, bias, in_features))
    for name in about["half"]:
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias", None)
        if model.get_parameter(f"{name}.weight").shape != weight.shape:
            raise ValueError(f"{name} has other sides")
        sparse = about["form"] == "two_four" and two_four.kernels(weight.device)[0] is not None
        put(model, name, HalfLinear(weight, bias, sparse and two_four.is_two_four(weight)))
    replaced = (*about["csr"], *about["half"])
    there = dict(model.named_parameters()) | dict(model.named_buffers())
    wanted = {name for name in there if name.rpartition(".")[0] not in replaced and name in model.state_dict()}
    if wanted != set(tensors):
        raise ValueError(f"it lacks or has beyond: {', '.join(sorted(wanted ^ set(tensors))[:5])}")
    for name, tensor in tensors.items():
        if there[name].shape == tensor.shape:
            there[name].copy_(tensor)
        else:
            _resize(model, name, tensor)
    for units in units_of(model) if about["form"] == "smaller" else []:
        sides = {len(model.get_parameter(name)) for name in units.into} | {model.get_parameter(units.out).shape[1]}
        if len(sides) > 1:
            raise ValueError(f"{units.out} does not fit the layers before it")


def _resize(model: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter of a linear layer that has become smaller."""
    path, _, own = name.rpartition(".")
    layer = model.get_submodule(path)
    if type(layer) is not nn.Linear or any(a > b for a, b in zip(tensor.shape, getattr(layer, own).shape, strict=True)):
        raise ValueError(f"{name} has other sides")
    setattr(layer, own, nn.Parameter(tensor))
    if own == "weight":
        layer.out_features, layer.in_features = tensor.shape
