"""2:4 sparsity with real kernels; each test skips, with the reason, where there are none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from labkit.experiment.machine import Machine
from labkit.experiment.registry import registry
from labkit.sparsity import export
from labkit.sparsity.semi_structured import missing
from tests.gpu.beside import beside

pytestmark = pytest.mark.gpu

# In a process of its own: tests of this one make sure that it has no CUDA context.
_PRODUCTS = """
import torch
from labkit.sparsity.n_m import n_of_m
from labkit.sparsity.two_four import compressed, kernels, sparse_product
device = torch.device("cuda", 0)
found, reason = kernels(device)
if found is None:
    raise SystemExit(reason)
torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16):
    for rows, outputs, inputs in ((64, 96, 128), (100, 32, 64), (1, 512, 2048), (4096, 2048, 512)):
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        weight *= n_of_m(weight, 2, 4)
        y, expected = sparse_product(x, weight), x.double() @ weight.double().t()
        assert y.shape == expected.shape and y.dtype == dtype
        error = float((y.double() - expected).abs().max() / expected.abs().max())
        assert error < 0.01, (dtype, rows, outputs, inputs, error)
        assert torch.equal(compressed(weight).to_dense(), weight)
        held = compressed(weight)
        size = sum(part.numel() * part.element_size() for part in (held.packed, held.meta) if part is not None)
        # Half of the numbers and two bits for each of them: 9/16. cuSPARSELt rounds the size of small ones up.
        assert size <= (0.5625 if weight.numel() > 1 << 19 else 0.65) * weight.numel() * weight.element_size(), size
print(found.BACKEND)
"""


@pytest.fixture(scope="module")
def backend() -> str:
    """The library whose kernels work here."""
    if reason := missing(Machine.here()):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PRODUCTS], capture_output=True, text=True, timeout=240
    )
    if done.returncode and "2:4 kernels do not work on" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_products_by_the_kernels_are_those_of_the_dense_weight(
    backend: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("backend", backend)
    assert backend in ("cusparselt", "cutlass")


def test_training_with_the_kernels_is_training_with_zeros(
    backend: str, record_property: Callable[[str, object], None]
) -> None:
    """The same losses up to 16 bits; every linear layer of the blocks multiplies so, once an update."""
    both = ["quantization.training=bf16", "sparsity.method=n_m"]
    kernel, dense = beside(f"2:4, {backend}", [*both, "sparsity.kernel=semi_structured"], both, record_property)
    effective = kernel.summary()["effective"]
    assert effective["sparse_kernel"] == "2:4 in 24 layers"
    assert float(effective["semi_structured_products"]) == 24
    assert dense.summary()["effective"]["sparse_kernel"] == "none"
    assert abs(kernel.data().loss - dense.data().loss).max() < 0.1
    assert kernel.summary()["effective"]["sparsity"] == dense.summary()["effective"]["sparsity"]


def test_the_trained_network_is_exported_with_the_kernels(
    backend: str, record_property: Callable[[str, object], None]
) -> None:
    from labkit.experiment import Experiment
    from labkit.launch import launch
    from tests.gpu.beside import WIDE

    changes = ["quantization.training=bf16", "sparsity.method=n_m", "sparsity.export=true"]
    run = launch(Experiment().set(WIDE).replace(*changes), baseline=None)
    run.result(300)
    found = run.summary()["exported"]
    assert {"dense", "dense_16", "two_four"} <= set(found["metrics"])
    assert found["layers"]["two_four"] == 24
    assert found["bytes"]["two_four"] < found["bytes"]["dense_16"] < found["bytes"]["dense"]
    losses = {form: metrics["loss"] for form, metrics in found["metrics"].items()}
    assert losses["dense_16"] == pytest.approx(losses["dense"], abs=0.02)
    assert losses["two_four"] == pytest.approx(losses["dense"], abs=0.02)
    for form, seconds in found["latency_seconds"]["512"].items():
        record_property(f"{form}_ms", 1000 * seconds)
    # What a GPU has packed can be used on a CPU, too.
    workload = registry("workload")["language"].load()
    task = workload.build(workload.Options(**run.experiment.workload.options), 0)
    assert export.load(run.directory.exported, task.model) == found["saved"]
    with torch.no_grad():
        batch = task.test.__getitems__(list(range(32)))
        assert torch.isfinite(task.model.eval()(batch["x"])).all()
