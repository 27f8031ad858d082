"""What numbers layers multiply is seen where they are multiplied, and seeing it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from labkit.experiment.layout import Layout
from labkit.parallel.mesh import Mesh
from labkit.quantization.arithmetic import FakeArithmetic, GridArithmetic, Int8Arithmetic, TernaryArithmetic
from labkit.quantization.linear import NarrowLinear, QuantizedLinearOp, narrow
from labkit.sparsity import csr
from labkit.training.probes.layers import BINS, MOST_LAYERS, LayerProbe, _Product, histogram
from tests.quantization.networks import wanted
from tests.quantization.test_runs import ran

MESH = Mesh(Layout(), 0, "cpu", connect=False)
ARITHMETICS: dict[str, Callable[[], QuantizedLinearOp]] = {
    "int8 × int8": lambda: Int8Arithmetic("stochastic", True),
    "int8 × ternary": TernaryArithmetic,
    "int8 grid × int8 grid": lambda: FakeArithmetic(8),
    "int8 grid × int4 grid": lambda: FakeArithmetic(4),
    "float32 × int8 grid": GridArithmetic,
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Flatten(),
        nn.Linear(144, 40),
        nn.ReLU(),
        nn.Linear(40, 33, bias=False),
        nn.GELU(),
        nn.Linear(33, 10),
    )


def watched(model: nn.Module, x: torch.Tensor, **autocast: Any) -> tuple[LayerProbe, torch.Tensor]:
    probe = LayerProbe({0: model}, {}, MESH)
    context = torch.autocast("cpu", **autocast) if autocast else torch.enable_grad()
    with context, probe.over(len(x)):
        out = model(x)
    return probe, out


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("words", ARITHMETICS)
def test_every_arithmetic_shows_what_it_multiplies(words: str) -> None:
    """What it tells, multiplied in float, is what it computes; and its numbers are those of the format."""
    arithmetic = ARITHMETICS[words]()
    layer = NarrowLinear(nn.Linear(70, 24, bias=False), arithmetic)
    if isinstance(arithmetic, GridArithmetic):
        arithmetic.round_weight(layer.weight.detach(), None)
    x = torch.randn(9, 70)
    inputs, weight = arithmetic.operands(x, layer.weight)
    assert f"{inputs.kind} × {weight.kind}" == words
    torch.testing.assert_close(functional.linear(inputs.numbers, weight.numbers), layer(x), rtol=1e-4, atol=1e-5)
    assert arithmetic.products <= 1, "to tell is not to multiply"


@pytest.mark.parametrize("words", ["int8 × int8", "int8 × ternary"])
def test_bytes_of_the_backward_products_are_as_declared(words: str) -> None:
    for arithmetic in (ARITHMETICS[words](), Int8Arithmetic("nearest", False)):
        layer = NarrowLinear(nn.Linear(16, 24, bias=False), arithmetic)
        x = torch.randn(9, 16)
        sizes = []
        for gradient_of in (x, layer.weight):
            x.requires_grad_(gradient_of is x)
            layer.weight.requires_grad_(gradient_of is not x)
            out = layer(x)
            with _Product() as product:
                torch.autograd.grad(out, gradient_of, torch.ones_like(out))
            assert product.call is not None
            sizes.append(product.call[1][0].element_size())
        assert tuple(sizes) == arithmetic.backward_bytes


def test_ternary_weights_are_three_spikes() -> None:
    model = network()
    names = narrow(model, TernaryArithmetic, False)
    probe, _ = watched(model, IMAGES)
    found = probe.event_fields()
    assert found["multiplied"] == {"float32 × float32": 2, "int8 × ternary": 2}
    by_name = {layer["name"]: layer for layer in found["layers"]}
    for name in names:
        weight = by_name[name]["weight"]
        spikes = {at: count for at, count in enumerate(weight["counts"]) if count}
        assert set(spikes) == {0, BINS // 2, BINS - 1}
        assert spikes[BINS // 2] / sum(spikes.values()) == pytest.approx(weight["zeros"])
        assert weight["factor"] == by_name[name]["input"]["factor"] == "int8"
        assert by_name[name]["stored"] == by_name[name]["answers"] == "float32"


def test_int4_has_fifteen_spikes_and_off_it_is_float32() -> None:
    """Before quantization-aware training has begun nothing is rounded, and nothing else is said."""
    model, made = network(), []
    narrow(model, lambda: made.append(FakeArithmetic(4)) or made[-1], False)
    on = watched(model, IMAGES)[0].event_fields()
    assert [sum(count > 0 for count in layer["weight"]["counts"]) for layer in on["layers"][1:3]] == [15, 15]
    assert on["layers"][1]["weight"]["share"] == "32 inputs"
    for arithmetic in made:
        arithmetic.active = False
    off = watched(model, IMAGES)[0].event_fields()
    assert off["multiplied"] == {"float32 × float32": 4}
    assert sum(count > 0 for count in off["layers"][1]["weight"]["counts"]) > 100


def test_autocast_shows_in_what_is_multiplied_and_answered() -> None:
    probe, _ = watched(network(), IMAGES, dtype=torch.bfloat16)
    found = probe.event_fields()
    assert found["multiplied"] == {"bfloat16 × bfloat16": 4}
    assert {layer["stored"] for layer in found["layers"]} == {"float32"}
    assert {layer["answers"] for layer in found["layers"]} == {"bfloat16"}
    disabled, _ = watched(network(), IMAGES, dtype=torch.bfloat16, enabled=False)
    assert disabled.event_fields()["multiplied"] == {"float32 × float32": 4}


def test_zeros_are_those_counted_by_hand() -> None:
    model = network()
    with torch.no_grad():
        model[4].weight.view(-1)[:300] = 0
        hidden = model[:4](IMAGES)
    layer = watched(model, IMAGES)[0].event_fields()["layers"][2]
    assert layer["input"]["zeros"] == pytest.approx(float((hidden == 0).float().mean()))
    assert 0.3 < layer["input"]["zeros"] < 0.7, "ReLU"
    assert layer["weight"]["zeros"] == pytest.approx(300 / (40 * 33))
    assert layer["weight"]["counts"][BINS // 2] >= 300
    assert sum(layer["weight"]["counts"]) == layer["weight"]["numbers"] == 40 * 33


def test_a_sparse_kernel_multiplies_what_is_not_zero() -> None:
    model = network()
    mask = torch.rand(33, 40, generator=torch.Generator().manual_seed(0)) < 0.25
    csr.replace(model, {"4.weight": mask})
    layer = watched(model, IMAGES)[0].event_fields()["layers"][2]
    assert (layer["input"]["kind"], layer["weight"]["kind"]) == ("float32", "sparse float32")
    assert layer["weight"]["zeros"] == pytest.approx(1 - float(mask.float().mean()))
    assert layer["shape"] == [33, 40]


def test_seeing_changes_nothing_and_leaves_nothing() -> None:
    model = network()
    narrow(model, lambda: Int8Arithmetic("stochastic", True), True)
    before, state = model(IMAGES), torch.random.get_rng_state()
    probe, during = watched(model, IMAGES)
    assert torch.equal(before, during)
    assert torch.equal(before, model(IMAGES))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [seen.rows for seen in probe.layers] == [8 * 36, 8, 8, 8]


def test_of_many_layers_some_are_told_from_the_first_to_the_last() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))
    found = watched(model, torch.ones(2, 4))[0].event_fields()
    names = [layer["name"] for layer in found["layers"]]
    assert (len(names), names[0], names[-1]) == (MOST_LAYERS, "0", "29")
    assert (found["of_layers"], found["multiplied"]) == (30, {"float32 × float32": 30})


def test_what_is_no_number_does_not_stop_the_counting() -> None:
    counts = histogram(torch.tensor([float("nan"), float("inf"), -1.0, 0.0]), 1.0)
    assert (counts[0], counts[BINS // 2], counts[-1]) == (1, 2, 1)
    assert sum(histogram(torch.zeros(3), 0.0)) == 3


# -- real runs --------------------------------------------------------------------------------------------------------


def test_stages_of_a_pipeline_are_joined_in_the_order_of_the_network() -> None:
    alone = ran(wanted("quantization.training=int8"))
    spread = ran(wanted("quantization.training=int8", "layout=pp2", "layout.microbatches=2"))
    whole, joined = alone.data(), spread.data()
    assert joined.multiplied == whole.multiplied == {"int8 × int8": 12, "float32 × float32": 1}
    assert {layer.stage for layer in joined.numbers} == {0, 1}
    order = [layer.name for layer in joined.numbers]
    assert [name for name in order if name in {layer.name for layer in whole.numbers}] == [
        layer.name for layer in whole.numbers
    ]
    assert "int8 × int8" in spread.summary()["effective"]["multiplied"]


def test_sharded_weights_are_seen_whole_and_cut_ones_in_part() -> None:
    sharded = ran(wanted("layout=shard2", "layout.zero_stage=3")).data()
    whole = {layer.name: layer for layer in sharded.numbers}
    assert whole["blocks.layer_0.mlp.down"].shape == (32, 128)
    assert not any(layer.part for layer in sharded.numbers)
    cut = {layer.name: layer for layer in ran(wanted("layout=tp2", "quantization.training=bf16")).data().numbers}
    down = cut["blocks.layer_0.mlp.down"]
    assert down.shape == (32, 64)
    assert down.part == "1 of 2 parts of the inputs (tp)"
    # The bias of a row-parallel layer is added in the dtype of the residual stream.
    assert (down.stored, down.multiplied, down.answers) == ("float32", "bfloat16 × bfloat16", "bfloat16")
    assert cut["blocks.layer_0.mlp.up"].answers == "bfloat16"


def test_an_update_rule_is_judged_in_the_types_in_which_it_trains() -> None:
    run = ran(wanted("layout=dp2", "gradients.update.method=local_sgd", "quantization.training=bf16"))
    assert set(run.data().multiplied) == {"bfloat16 × bfloat16"}


def test_without_an_evaluation_nothing_is_looked_at() -> None:
    data = ran(wanted("training.evaluate_every=0", "quantization.training=int8")).data()
    assert (data.numbers, data.multiplied, data.kernels) == ([], {}, [])


def test_masks_show_in_what_is_multiplied() -> None:
    data = ran(wanted("sparsity.method=n_m")).data()
    halved = [layer.weight.zeros for layer in data.numbers if "mlp" in layer.name]
    assert halved == pytest.approx([0.5] * len(halved), abs=0.01)
    np.testing.assert_allclose([layer.weight.counts.sum() > 0 for layer in data.numbers], True)
