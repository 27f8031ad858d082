"""2:4 by the kernels of GPUs: who is refused, and that all around them is right, with a dense product there."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from labkit.experiment import Machine
from labkit.experiment.machine import Gpu
from labkit.launch.doctor import Finding, kernels_for_two_four
from labkit.parallel.entries import OptimizerShards
from labkit.sparsity import two_four
from labkit.sparsity.masks import Masks
from labkit.sparsity.method import SparsityContext
from labkit.sparsity.n_m import NM, n_of_m
from labkit.sparsity.semi_structured import missing
from labkit.sparsity.two_four import SemiStructuredLinear, fits, is_two_four
from tests.sparsity.test_methods import Alone, experiment

CPU = Machine(cores=2, cores_total=2, memory_bytes=8 << 30, gpu_reason="there is none")
A100 = Gpu(0, "GPU-1", "A100", 80 << 30, 0, (8, 0))
GPU = replace(CPU, gpus=(A100,), torch_cuda="12.8")


def asked(**changes: object) -> list[tuple[str, str]]:
    """Field and reason of every problem on a machine with an A100."""
    machine = changes.pop("machine", GPU)
    usual = {
        "sparsity": {"method": "n_m", "kernel": "semi_structured"},
        "quantization__training": "bf16",
        "launch__device": "auto",
    }
    found = experiment("n_m", **(usual | changes)).problems(machine)  # type: ignore[arg-type]
    return [(problem.field, problem.reason) for problem in found]


def test_a_machine_says_why_it_has_no_such_kernels() -> None:
    old = replace(GPU, gpus=(A100, replace(A100, capability=(7, 5))))
    unknown = replace(GPU, gpus=(replace(A100, capability=None),))
    assert missing(GPU) == ""
    assert missing(CPU) == "2:4 kernels need a GPU (there is none)"
    assert missing(old).endswith("the lowest here is 7.5")
    assert missing(unknown).endswith("the lowest here is unknown")
    assert "CUDA build of torch" in missing(replace(GPU, torch_cuda=""))
    assert kernels_for_two_four(CPU) == Finding(
        "sparsity.kernel", f"semi_structured is unavailable here: {missing(CPU)}"
    )
    assert kernels_for_two_four(GPU).fine


def test_what_the_kernels_cannot_do_is_refused() -> None:
    assert asked() == []
    assert asked(quantization__training="fp16") == []
    assert asked(machine=CPU) == [("sparsity.kernel", missing(CPU))]
    assert [field for field, _ in asked(launch__device="cpu")] == ["sparsity.kernel"]
    for training in ("fp32", "fp64", "int8", "pure_bf16"):
        [(field, said)] = asked(quantization__training=training)
        assert field == "quantization.training"
        assert training in said
    [(field, said)] = asked(sparsity={"method": "n_m", "n": 1, "m": 4, "kernel": "semi_structured"})
    assert (field, "not for 1 of 4" in said) == ("sparsity.kernel", True)
    [(field, said)] = asked(layout={"dp_shard": 2, "zero_stage": 2})
    assert (field, "the layout is" in said) == ("sparsity.kernel", True)
    assert asked(layout={"dp_replicate": 2}) == []


def test_a_rank_without_the_kernels_says_so() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    given = experiment("n_m", sparsity={"method": "n_m", "kernel": "semi_structured"})
    with pytest.raises(ValueError, match="need a GPU, and this is cpu"):
        NM.prepare(model, given, NM.Options(kernel="semi_structured"), {"0.weight": (32, 64)}, lambda: torch.zeros(1))
    with pytest.raises(ValueError, match="need a GPU"):
        two_four.compress(torch.zeros(32, 64))


def test_patterns_and_sides() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    assert not is_two_four(weight)
    assert is_two_four(weight * n_of_m(weight, 2, 4))
    assert is_two_four(weight * n_of_m(weight, 1, 4))
    assert not is_two_four(weight * n_of_m(weight, 4, 8))
    assert not is_two_four(torch.zeros(4, 6))
    assert not is_two_four(torch.zeros(4, 4, 4))
    assert [fits(torch.zeros(*sides)) for sides in ((32, 64), (16, 64), (32, 32), (96, 128), (4, 4, 4))] == [
        True,
        False,
        False,
        True,
        False,
    ]


def dense_product(x: Tensor, weight: Tensor) -> Tensor:
    """What the kernels compute."""
    assert is_two_four(weight)
    assert x.is_contiguous()
    assert x.dim() == 2
    return x @ weight.t()


def test_around_the_kernel_the_layer_computes_what_the_masked_dense_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_four, "DTYPES", (torch.float64,))
    torch.manual_seed(0)
    dense = nn.Linear(64, 32).double()
    with torch.no_grad():
        dense.weight.mul_(n_of_m(dense.weight, 2, 4))
    layer = SemiStructuredLinear(copy.deepcopy(dense), dense_product)
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    change = torch.randn(3, 5, 32, dtype=torch.float64)
    for masked, products in ((True, 1), (False, 1)):
        layer.masked = masked
        for parameter in (x, y, *dense.parameters(), *layer.parameters()):
            parameter.grad = None
        expected, found = dense(x), layer(y)
        expected.backward(change)
        found.backward(change)
        assert layer.products == products
        assert (expected - found).abs().max() < 1e-6
        assert (x.grad - y.grad).abs().max() < 1e-6
        assert (dense.weight.grad - layer.weight.grad).abs().max() < 1e-6
        assert (layer.weight.grad != 0).all(), "straight through to all weights"
        assert (dense.bias.grad - layer.bias.grad).abs().max() < 1e-6


def test_under_autocast_it_multiplies_in_16_bits_and_the_gradient_comes_back_in_32() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 32)
    with torch.no_grad():
        dense.weight.mul_(n_of_m(dense.weight, 2, 4))
    layer = SemiStructuredLinear(copy.deepcopy(dense), dense_product)
    layer.masked = True
    x = torch.randn(8, 64)
    found = layer(x)
    assert (found.dtype, layer.products) == (torch.float32, 0), "float32 has no such kernel"
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(x), dense(x)
    assert (found.dtype, layer.products) == (torch.bfloat16, 1)
    assert (found - expected).abs().max() < 0.05
    found.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_sr_ste_with_such_layers_trains_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes, updates and evaluations as the trainer makes them; products of updates are counted, others are not."""
    monkeypatch.setattr(two_four, "DTYPES", (torch.float64,))
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).double()
    shapes = {"0.weight": (64, 64), "2.weight": (32, 64), "4.weight": (8, 32)}
    data = torch.randn(16, 64, dtype=torch.float64)
    ends, steps = [], 4
    for special in (False, True):
        model = copy.deepcopy(start)
        layers = two_four.replace(model, shapes, dense_product) if special else {}
        assert set(layers) == ({"0.weight", "2.weight"} if special else set()), "the last one has too few outputs"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        masks = Masks(OptimizerShards(Alone(model), list(shapes)), optimizer)
        options = NM.Options(kernel="semi_structured" if special else "dense")
        method = NM(SparsityContext(experiment("n_m"), options, masks, shapes, steps, layers, []))
        for step in range(steps):
            for _ in range(2):
                with method.effective_weights(step):
                    model(data).square().mean().backward()
            method.before_update(step)
            optimizer.step()
            method.after_update(step)
            optimizer.zero_grad()
            with method.effective_weights(), torch.no_grad():
                model(data)
        assert method.statistics() == ({"semi_structured_products": 4.0} if special else {})
        ends.append(model)
    for one, other in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert (one - other).abs().max() < 1e-9
    assert is_two_four(ends[1][0].weight)
