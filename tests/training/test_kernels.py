"""What kernels promise is exact arithmetic; what they give is measured, and asserted only where it cannot be missed."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from labkit.experiment import Experiment
from labkit.quantization.arithmetic import Int8Arithmetic, TernaryArithmetic
from labkit.quantization.linear import narrow
from labkit.runs import kernels as reading
from labkit.sparsity import csr
from labkit.training.after import kernels
from labkit.training.probes.layers import LayerProbe
from tests.quantization.networks import wanted
from tests.quantization.test_runs import ran
from tests.training.test_numbers import MESH

EXPERIMENT = Experiment().replace("training.global_batch=64")


def measured(model: nn.Module, x: torch.Tensor, **autocast: Any) -> tuple[list[reading.Kind], dict[str, Any]]:
    def inside() -> Any:
        return torch.autocast("cpu", **autocast) if autocast else nullcontext()

    probe = LayerProbe({0: model}, {}, MESH)
    with torch.no_grad(), inside(), probe.over(len(x)):
        model(x)
    found = kernels.measure(EXPERIMENT, probe.layers, probe.samples, inside, lambda: None)
    return reading.read(found["kinds"]), found


def two(inputs: int, outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, inputs), nn.Linear(inputs, 10))


def test_theory_of_formats_is_the_bytes_of_three_products() -> None:
    for arithmetic, bytes_of, times in (
        (lambda: Int8Arithmetic("nearest", True), (1, 1, 1), 4.0),
        (lambda: Int8Arithmetic("nearest", False), (1, 1, 4), 2.0),
        (TernaryArithmetic, (1, 4, 4), 4 / 3),
    ):
        model = two(32, 64)
        narrow(model, arithmetic, True)
        kinds, found = measured(model, torch.randn(32, 32))
        assert all(kind.bytes == bytes_of for kind in kinds)
        assert reading.theory(kinds) == pytest.approx(times)
        assert found["left_out"] == 0
    kinds, _ = measured(two(32, 64), torch.randn(32, 32), dtype=torch.bfloat16)
    assert reading.theory(kinds) == pytest.approx(2.0)
    assert kinds[0].multiplied == "bfloat16 × bfloat16"


def test_theory_of_masks_is_the_weights_that_are_left() -> None:
    model = two(32, 64)
    with torch.no_grad():
        model[0].weight.view(-1)[: 32 * 64 // 2] = 0
    kinds, _ = measured(model, torch.randn(32, 32))
    by_shape = {kind.shape: kind for kind in kinds}
    assert by_shape[(64, 32)].theory == 2.0
    assert by_shape[(32, 64)].theory == 1.0
    assert reading.theory(kinds) == pytest.approx((2 * 32 * 64 + 320) / (1.5 * 32 * 64 + 320))
    # Rows are those of a rank's pass in training: 64 samples, whatever the batch was that was seen.
    assert by_shape[(64, 32)].rows == 64
    assert by_shape[(64, 32)].dense_flops == 6 * 64 * 32 * 64


def test_sparse_products_with_two_of_a_hundred_weights_are_faster() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 10))
    csr.replace(model, {"0.weight": torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0)) < 0.02})
    (sparse, head), _ = measured(model, torch.randn(64, 1024))
    assert sparse.multiplied == "float32 × sparse float32"
    assert sparse.theory == pytest.approx(50, rel=0.02)
    assert sparse.kernel is not None
    assert sparse.kernel > 1.5
    assert head.kernel == 1.0, "a layer that is left as it is costs what a dense one costs"


def test_layers_that_are_alike_are_measured_once_and_nothing_is_touched() -> None:
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(5)), nn.Linear(48, 10))
    narrow(model, lambda: Int8Arithmetic("stochastic", True), False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    products = [module.arithmetic.products for module in model[:5]]
    kinds, _ = measured(model, torch.randn(16, 48))
    assert [(kind.count, kind.shape) for kind in kinds] == [(5, (48, 48)), (1, (10, 48))]
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.arithmetic.products - 1 for module in model[:5]] == products, "one forward pass of our own"


def test_convolutions_are_measured_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 4))
    kinds, found = measured(model, torch.randn(8, 3, 8, 8), dtype=torch.bfloat16)
    conv = next(kind for kind in kinds if len(kind.shape) == 4)
    assert (conv.rows, conv.weights, conv.theory) == (64 * 9, 8 * 27, 2.0)
    assert conv.seconds is not None
    assert found["left_out"] == 0


@pytest.mark.alone
def test_it_takes_a_bounded_time() -> None:
    """A pass of this layer over all its rows takes seconds: it is measured on some of them."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 10))
    narrow(model, lambda: Int8Arithmetic("stochastic", True), True)
    begun = time.perf_counter()
    kinds, _ = measured(model, torch.randn(16, 64, 1024))
    assert time.perf_counter() - begun < 20 * kernels.BUDGET_S
    assert kinds[0].rows == 4096
    assert kinds[0].seconds is not None
    assert kinds[0].measured <= 1


def test_only_sparse_and_narrow_runs_are_measured() -> None:
    for change, expected in (
        ("quantization.training=fp64", False),
        ("optimizer.state_bits=8", False),
        ("quantization.training=int8", True),
        ("quantization.qat=int8", True),
    ):
        assert kernels.is_requested(EXPERIMENT.replace(change)) is expected
    assert kernels.is_requested(EXPERIMENT.replace("sparsity.method=static", "sparsity.target=0.9"))
    isolated = EXPERIMENT.replace("quantization.training=int8", "layout=dp2", "launch.isolated=true")
    assert not kernels.is_requested(isolated)


def test_a_pass_of_a_rank_is_a_share_of_the_batch() -> None:
    assert kernels.share(EXPERIMENT.replace("layout=dp2", "gradients.accumulation=2")) == 16
    assert kernels.share(EXPERIMENT.replace("layout=dp2·pp2", "layout.microbatches=4")) == 8
    assert kernels.share(EXPERIMENT.replace("layout=pp2", "layout.schedule=naive")) == 64


def test_a_run_tells_both_numbers_in_its_summary() -> None:
    sparse = ("sparsity.method=static", "sparsity.target=0.9", "sparsity.kernel=csr")
    run = ran(wanted(*sparse))
    kinds, summary = run.data().kernels, run.summary()["kernels"]
    csr_layers = [kind for kind in kinds if "sparse" in kind.multiplied]
    assert sum(kind.count for kind in csr_layers) == 12
    assert all(kind.theory == pytest.approx(10, rel=0.05) for kind in csr_layers)
    assert summary["theory"] == pytest.approx(reading.theory(kinds))
    assert summary["kernel"] == pytest.approx(reading.kernel(kinds))
    assert ran(wanted()).summary()["kernels"] is None
