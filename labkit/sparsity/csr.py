"""A linear layer that computes with its non-zero weights only, on CPUs, forward and backward.

The weight matrix W [outputs, inputs] is stored as compressed sparse rows (CSR): the values in one vector, which is the
parameter, and their column indices. With activations as columns, a training step consists of three sparse products:

    Y = W·X,   ∂X = Wᵀ·∂Y,   ∂W = (∂Y·Xᵀ at the indices of the values)

Wᵀ is CSR too, with the same values in another order; indices and order are computed only when the topology changes.
torch computes the products with MKL (float32 and float64). Other formulations that torch offers are slower than dense
ones or cannot train: `linear(x, W)` is 4.5 to 7.5 times slower, and optimizers refuse parameters that are CSR tensors.
Source: Nikdan et al., "SparseProp", ICML 2023, arXiv:2302.04852.
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
    """Sparsity pattern: the entries of a weight matrix that are kept, and their order in its transpose."""

    def __init__(self, mask: Tensor) -> None:
        _silence_beta_warning()
        self.shape = tuple(mask.shape)
        self.set(mask)

    def set(self, mask: Tensor) -> None:
        """Keep the entries of this mask from now on: bool, [outputs, inputs]."""
        rows, columns = self.shape
        self.index = mask.flatten().nonzero().flatten()
        """Indices of the values in the flat matrix, in ascending order."""
        row, column = self.index // columns, self.index % columns
        self._row_ends, self._columns = _row_offsets(row, rows), column.int()
        self._order = (column * rows + row).argsort()
        self._column_ends, self._rows = _row_offsets(column, columns), row[self._order].int()

    def to_dense(self, values: Tensor) -> Tensor:
        """Return the dense matrix with these values."""
        dense = values.new_zeros(self.shape)
        dense.view(-1)[self.index] = values.detach()
        return dense

    def from_dense(self, dense: Tensor) -> Tensor:
        """Return the kept values of a dense matrix, as the inverse of `to_dense`."""
        return dense.reshape(-1)[self.index]

    def matrix(self, values: Tensor) -> Tensor:
        """Return W with these values as a CSR tensor."""
        return csr_matrix(self._row_ends, self._columns, values, self.shape)

    def transpose(self, values: Tensor) -> Tensor:
        """Return Wᵀ with these values as a CSR tensor."""
        return csr_matrix(self._column_ends, self._rows, values[self._order], self.shape[::-1])


@functools.cache
def _silence_beta_warning() -> None:
    """Trigger torch's warning that CSR support is in beta, which comes once per process, and suppress it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(2).to_sparse_csr()


def _row_offsets(rows: Tensor, size: int) -> Tensor:
    """Return CSR row offsets [size + 1] from the sorted row index of each value."""
    counts = torch.bincount(rows, minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def csr_matrix(ends: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Build a CSR tensor without invariant checks, which are slow; invalid input crashes the process."""
    return torch.sparse_csr_tensor(ends, indices, values, shape, check_invariants=False)


class _Product(torch.autograd.Function):
    """Computes x·Wᵀ [N, outputs] from x [N, inputs] and the values of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layer: CsrLinear) -> Tensor:
        columns = x.t().contiguous()
        ctx.save_for_backward(columns, values)
        ctx.layer = layer
        return (layer.pattern.matrix(values) @ columns).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        columns, values = ctx.saved_tensors
        pattern, output_gradient = ctx.layer.pattern, gradients[0].t().contiguous()
        if ctx.layer.dense_gradient is not None:
            ctx.layer.dense_gradient += output_gradient @ columns.t()
        x_gradient = (pattern.transpose(values) @ output_gradient).t() if ctx.needs_input_grad[0] else None
        values_gradient = None
        if ctx.needs_input_grad[1]:
            sampled = pattern.matrix(torch.zeros_like(values))
            values_gradient = torch.sparse.sampled_addmm(sampled, output_gradient, columns.t(), beta=0.0).values()
        return x_gradient, values_gradient, None


class CsrLinear(nn.Module):
    """Replaces an `nn.Linear` ([..., inputs] to [..., outputs]); `weight` holds the kept values only."""

    def __init__(self, layer: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.pattern = Pattern(mask.to(layer.weight.device))
        self.weight = nn.Parameter(self.pattern.from_dense(layer.weight.detach()))
        self.weight.labkit_decays = True  # type: ignore[attr-defined]
        self.bias = layer.bias
        self.dense_gradient: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x.reshape(-1, self.in_features), self.weight, self)  # type: ignore[no-untyped-call]
        out = out.unflatten(0, x.shape[:-1]) if x.dim() != 2 else out
        return out if self.bias is None else out + self.bias

    def record_dense_gradient(self) -> None:
        """Let backward passes accumulate the gradient of all weights, kept or not, from now on."""
        if self.dense_gradient is None:
            self.dense_gradient = self.weight.detach().new_zeros(self.pattern.shape)

    def pop_dense_gradient(self) -> Tensor:
        """Return the gradient of all weights [outputs, inputs] and stop accumulating it."""
        gradient, self.dense_gradient = self.dense_gradient, None
        assert gradient is not None
        return gradient

    def extra_repr(self) -> str:
        kept = len(self.weight) / (self.in_features * self.out_features)
        return f"{self.in_features} -> {self.out_features}, {kept:.1%} kept"


def replace(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, CsrLinear]:
    """Replace each linear layer whose weight is named in `masks` by a `CsrLinear`; return these by that name."""
    layers = {}
    for name, mask in masks.items():
        path = name.rpartition(".")[0]
        parent, _, attribute = path.rpartition(".")
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            layers[name] = CsrLinear(layer, mask)
            setattr(model.get_submodule(parent), attribute, layers[name])
    return layers


def faster_layers(model: nn.Module, masks: dict[str, Tensor], sample: Tensor, experiment: Experiment) -> set[str]:
    """Return the names of the weights whose layers train faster as CSR than dense, as measured here (collective).

    The first rank measures for all, because all must decide the same: a forward and backward pass over as many rows as
    a rank's share of the batch has.
    """
    result: list[set[str]] = [set()]
    distributed = dist.is_initialized()
    if not distributed or dist.get_rank() == 0:
        share = experiment.training.global_batch / experiment.layout.dp_replicate / experiment.gradients.accumulation
        rows = {name: math.ceil(count * share) for name, count in count_rows(model, masks, sample).items()}
        is_faster: dict[tuple[int, ...], bool] = {}
        for name, mask in masks.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            if name in rows and isinstance(layer, nn.Linear):
                key = (*mask.shape, int(mask.sum()), rows[name])
                if key not in is_faster:
                    is_faster[key] = _seconds(CsrLinear(layer, mask), rows[name]) < _seconds(layer, rows[name])
                result[0] |= {name} if is_faster[key] else set()
    if distributed:
        dist.broadcast_object_list(result, 0)
    return result[0]


@torch.no_grad()
def count_rows(model: nn.Module, names: Iterable[str], sample: Tensor) -> dict[str, int]:
    """Return how many rows the linear layers with these weights get for an input, by the weights' names."""
    rows: dict[str, int] = {}
    hooks = []
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])

        def record(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            rows[name] = inputs[0].numel() // inputs[0].shape[-1]

        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(record))
    with same_buffers(model):
        model(sample)
    for hook in hooks:
        hook.remove()
    return rows


def _seconds(layer: nn.Linear | CsrLinear, rows: int, repeats: int = 5) -> float:
    """Return the seconds of the fastest forward and backward pass, since disturbances only add time.

    It leaves no gradient behind.
    """
    weight = layer.weight
    x = weight.detach().new_zeros(rows, layer.in_features).requires_grad_()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        out = layer(x)
        torch.autograd.grad(out, [x, weight], torch.ones_like(out))
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
