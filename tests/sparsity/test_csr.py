"""Layers that compute with their non-zero weights only compute the same, and train the same network."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from labkit.sparsity.choose import random_mask
from labkit.sparsity.csr import CsrLinear, Pattern, faster_layers, replace
from tests.sparsity.test_methods import EXACT, LAYOUTS, alone, experiment, finished, weights

CSR = {"method": "rigl", "target": 0.8, "every": 3, "kernel": "csr"}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 7), st.floats(0, 1), st.booleans())
def test_the_three_products_are_those_of_the_dense_layer(
    inputs: int, outputs: int, rows: int, part: float, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).double()
    mask = random_mask((outputs, inputs), round(part * inputs * outputs), 1)
    with torch.no_grad():
        layer.weight.mul_(mask)
    sparse = CsrLinear(layer, mask)
    x = torch.randn(2, rows, inputs, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    sparse.record_dense_gradient()
    expected, found = layer(x), sparse(y)
    assert found.shape == expected.shape
    change = torch.randn_like(expected)
    expected.backward(change)
    bias_gradient = layer.bias.grad.clone() if bias else None
    if bias:
        layer.bias.grad = None
    found.backward(change)
    assert (expected - found).abs().max() < 1e-12
    assert (x.grad - y.grad).abs().max() < 1e-12
    assert sparse.weight.shape == (mask.sum(),)
    if mask.any():
        assert (layer.weight.grad[mask] - sparse.weight.grad).abs().max() < 1e-12
    assert (layer.weight.grad - sparse.pop_dense_gradient()).abs().max() < 1e-12
    if bias:
        assert (sparse.bias.grad - bias_gradient).abs().max() < 1e-12


def test_values_find_their_places_again() -> None:
    mask = random_mask((5, 7), 11, 0)
    pattern = Pattern(mask)
    dense = torch.randn(5, 7) * mask
    assert torch.equal(pattern.to_dense(pattern.from_dense(dense)), dense)
    assert torch.equal(pattern.matrix(pattern.from_dense(dense)).to_dense(), dense)
    assert torch.equal(pattern.transpose(pattern.from_dense(dense)).to_dense(), dense.t())


@pytest.mark.parametrize("layout", [None, "dp2"])
def test_the_kernel_trains_the_same_network(layout: str | None) -> None:
    """While the topology changes, with gradients of weights that are not there."""
    one = alone("rigl")
    other = finished(experiment("rigl", LAYOUTS[layout] if layout else None, sparsity=CSR))
    assert np.abs(one.data().loss - other.data().loss).max() <= EXACT
    ours, theirs = weights(one), weights(other)
    for name, value in ours.items():
        assert torch.equal(value == 0, theirs[name] == 0), "checkpoints hold dense weights"
        assert (value - theirs[name]).abs().max() <= EXACT
    assert other.summary()["effective"]["sparse_kernel"] == "csr in 12 layers"
    assert one.summary()["effective"]["sparse_kernel"] == "none"


def test_a_checkpoint_changes_its_kernel() -> None:
    whole = finished(experiment("rigl", sparsity=CSR, training__checkpoint_every=6, training__keep_checkpoints=9))
    shutil.rmtree(whole.directory.checkpoint(12))
    for other in (experiment("rigl", LAYOUTS["tp2"]), whole.experiment):
        again = finished(other, resume=whole)
        assert np.abs(again.data().loss - whole.data().loss[6:]).max() <= EXACT


def test_a_layer_is_replaced_only_where_that_is_faster() -> None:
    """1,024 x 1,024 with 2 % of the weights: several times faster; with all of them: several times slower."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024))
    masks = {"0.weight": random_mask((1024, 1024), 20_000, 0), "2.weight": torch.ones(1024, 1024, dtype=torch.bool)}
    given_ = experiment("rigl", training__global_batch=64)
    assert faster_layers(model, masks, torch.zeros(1, 1024), given_) == {"0.weight"}
    assert list(replace(model, {"0.weight": masks["0.weight"]})) == ["0.weight"]
    assert [type(layer).__name__ for layer in model] == ["CsrLinear", "GELU", "Linear"]


def test_auto_measures_on_one_rank_for_all() -> None:
    run = finished(experiment("static", LAYOUTS["dp2"], sparsity={"method": "static", "target": 0.8, "kernel": "auto"}))
    assert run.state == "finished"
    assert run.summary()["effective"]["sparsity"] == pytest.approx(0.8, abs=0.002)


@pytest.mark.parametrize(
    "changes", [{"layout": {"tp": 2}}, {"quantization__training": "bf16"}, {"layout": {"dp_shard": 2}}]
)
def test_where_it_cannot_compute_it_is_refused(changes: dict[str, object]) -> None:
    assert "sparsity.kernel" in [problem.field for problem in experiment("rigl", sparsity=CSR, **changes).problems()]
