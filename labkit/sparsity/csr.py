"""A linear layer that computes with its non-zero weights only, on CPUs, forward and backward.

The weight matrix W [outputs, inputs] is kept as compressed sparse rows (CSR): the values in one vector, which is the
parameter, and their columns. With activations as columns, three sparse products make a training step:

    Y = W·X,   ∂X = Wᵀ·∂Y,   ∂W = (∂Y·Xᵀ at the places of the values)

Wᵀ is CSR too, with the same values in another order; places and order are computed when the topology changes only. The
products are MKL's, through torch (float32 and float64). Other formulations that torch offers are slower than dense or
cannot train: `linear(x, W)` by 4.5 to 7.5 times, and optimizers refuse parameters that are CSR tensors themselves.
Sources: Nikdan et al., "SparseProp", ICML 2023, arXiv:2302.04852; issue 5.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.workloads.same_buffers import same_buffers

if TYPE_CHECKING:
    from labkit.experiment import Experiment


class Pattern:
    """Which places of a weight matrix are kept, and how its transpose is ordered."""

    def __init__(self, mask: Tensor) -> None:
        _hear_out_torch()
        self.shape = tuple(mask.shape)
        self.set(mask)

    def set(self, mask: Tensor) -> None:
        """Keep these places from now on: bool, [outputs, inputs]."""
        rows, columns = self.shape
        self.index = mask.flatten().nonzero().flatten()
        """Places of the values in the flat matrix, in order."""
        row, column = self.index // columns, self.index % columns
        self._row_ends, self._columns = _ends(row, rows), column.int()
        self._order = (column * rows + row).argsort()
        self._column_ends, self._rows = _ends(column, columns), row[self._order].int()

    def spread(self, values: Tensor) -> Tensor:
        """The dense matrix."""
        dense = values.new_zeros(self.shape)
        dense.view(-1)[self.index] = values.detach()
        return dense

    def taken(self, dense: Tensor) -> Tensor:
        """The values of a dense matrix at the places that are kept: the inverse of `spread`."""
        return dense.reshape(-1)[self.index]

    def matrix(self, values: Tensor) -> Tensor:
        """W."""
        return csr_matrix(self._row_ends, self._columns, values, self.shape)

    def transpose(self, values: Tensor) -> Tensor:
        """Wᵀ."""
        return csr_matrix(self._column_ends, self._rows, values[self._order], self.shape[::-1])


@functools.cache
def _hear_out_torch() -> None:
    """It says once in a process that CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(2).to_sparse_csr()


def _ends(rows: Tensor, size: int) -> Tensor:
    """Where each of `size` rows ends, from the rows of the values."""
    counts = torch.bincount(rows, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def csr_matrix(ends: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unchecked, which takes time: what is no matrix ends the process."""
    return torch.sparse_csr_tensor(ends, indices, values, shape, check_invariants=False)


class _Product(torch.autograd.Function):
    """x [N, inputs] and values to x·Wᵀ [N, outputs]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: CsrLinear) -> Tensor:
        columns = x.t().contiguous()
        ctx.save_for_backward(columns, values)
        ctx.layer = layer
        return (layer.pattern.matrix(values) @ columns).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        columns, values = ctx.saved_tensors
        pattern, change = ctx.layer.pattern, gradients[0].t().contiguous()
        if ctx.layer.dense_gradient is not None:
            ctx.layer.dense_gradient += change @ columns.t()
        of_x = (pattern.transpose(values) @ change).t() if ctx.needs_input_grad[0] else None
        of_values = None
        if ctx.needs_input_grad[1]:
            places = pattern.matrix(torch.zeros_like(values))
            of_values = torch.sparse.sampled_addmm(places, change, columns.t(), beta=0.0).values()
        return of_x, of_values, None


class CsrLinear(nn.Module):
    """In place of an `nn.Linear`: [..., inputs] to [..., outputs]; `weight` [values] are those that are kept."""

    def __init__(self, layer: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.pattern = Pattern(mask.to(layer.weight.device))
        self.weight = nn.Parameter(self.pattern.taken(layer.weight.detach()))
        self.weight.labkit_decays = True  # type: ignore[attr-defined]
        self.bias = layer.bias
        self.dense_gradient: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x.reshape(-1, self.in_features), self.weight, self)  # type: ignore[no-untyped-call]
        out = out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out
        return out if self.bias is None else out + self.bias

    def watch(self) -> None:
        """Backward passes add up the gradient of all weights from here on, too."""
        if self.dense_gradient is None:
            self.dense_gradient = self.weight.detach().new_zeros(self.pattern.shape)

    def watched(self) -> Tensor:
        """That gradient [outputs, inputs]; it is not added up any more."""
        gradient, self.dense_gradient = self.dense_gradient, None
        assert gradient is not None
        return gradient

    def extra_repr(self) -> str:
        kept = len(self.weight) / (self.in_features * self.out_features)
        return f"{self.in_features} -> {self.out_features}, {kept:.1%} kept"


def replace(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, CsrLinear]:
    """Put a `CsrLinear` in place of each linear layer whose weight is named in `masks`; returns them by that name."""
    made = {}
    for name, mask in masks.items():
        path = name.rpartition(".")[0]
        parent, _, own = path.rpartition(".")
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            made[name] = CsrLinear(layer, mask)
            setattr(model.get_submodule(parent), own, made[name])
    return made


def faster(model: nn.Module, masks: dict[str, Tensor], sample: Tensor, experiment: Experiment) -> set[str]:
    """Names of the weights whose layers train faster with CSR than dense, as measured here (collective).

    The first rank measures for all, because all must decide alike: a pass forward and backward over as many rows as a
    rank's share of the batch has.
    """
    found: list[set[str]] = [set()]
    together = dist.is_initialized()
    if not together or dist.get_rank() == 0:
        share = experiment.training.global_batch / experiment.layout.dp_replicate / experiment.gradients.accumulation
        rows = {name: math.ceil(count * share) for name, count in rows_seen(model, masks, sample).items()}
        known: dict[tuple[int, ...], bool] = {}
        for name, mask in masks.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            if name in rows and isinstance(layer, nn.Linear):
                kind = (*mask.shape, int(mask.sum()), rows[name])
                if kind not in known:
                    known[kind] = _seconds(CsrLinear(layer, mask), rows[name]) < _seconds(layer, rows[name])
                found[0] |= {name} if known[kind] else set()
    if together:
        dist.broadcast_object_list(found, 0)
    return found[0]


@torch.no_grad()
def rows_seen(model: nn.Module, names: Iterable[str], sample: Tensor) -> dict[str, int]:
    """How many rows the linear layers with these weights see of an input, by the weights' names."""
    rows: dict[str, int] = {}
    hooks = []
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])

        def see(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            rows[name] = inputs[0].numel() // inputs[0].shape[-1]

        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(see))
    with same_buffers(model):
        model(sample)
    for hook in hooks:
        hook.remove()
    return rows


def _seconds(layer: nn.Linear | CsrLinear, rows: int, repeats: int = 5) -> float:
    """Of the fastest pass forward and backward: whatever disturbs one adds to it. Leaves no gradient behind."""
    weight = layer.weight
    x = weight.detach().new_zeros(rows, layer.in_features).requires_grad_()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        out = layer(x)
        torch.autograd.grad(out, [x, weight], torch.ones_like(out))
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
