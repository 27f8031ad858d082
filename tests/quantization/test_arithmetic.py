"""Layers in another number format: right up to rounding, counted, and still the layers that they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from labkit.quantization.arithmetic import (
    FakeArithmetic,
    GridArithmetic,
    Int8Arithmetic,
    TernaryArithmetic,
    off_grid,
)
from labkit.quantization.codes import ternary_codes
from labkit.quantization.converted import Int4WeightLinear, Int8DynamicLinear, convert, dequantize
from labkit.quantization.linear import NarrowLinear, QuantizedLinearOp, chosen, cublas_operands, int8_product, narrow
from tests.quantization.networks import small, tokens


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input and gradient of the weight."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad, layer.weight.grad.clone()  # type: ignore[union-attr,operator]


def error(found: Tensor, right: Tensor) -> float:
    return float(((found - right).norm() / right.norm()).detach())


def layer(make: Callable[[], QuantizedLinearOp], seed: int = 0) -> tuple[NarrowLinear, nn.Linear, QuantizedLinearOp]:
    torch.manual_seed(seed)
    dequantize = nn.Linear(64, 48)
    arithmetic = make()
    arithmetic.noise = torch.Generator().manual_seed(seed)
    return NarrowLinear(dequantize, arithmetic), dequantize, arithmetic


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("of_weight", [True, False])
def test_int8_training_makes_all_three_products_in_int8(rounding: str, of_weight: bool) -> None:
    narrow_one, plain_one, arithmetic = layer(lambda: Int8Arithmetic(rounding, of_weight))
    x, grad = torch.randn(3, 10, 64), torch.randn(3, 10, 48)
    found, right = gradients(narrow_one, x, grad), gradients(plain_one, x, grad)
    assert arithmetic.products == (3 if of_weight else 2)
    for one, other in zip(found, right, strict=True):
        assert one.shape == other.shape
        assert error(one, other) < 0.03
    assert (error(found[2], right[2]) < 1e-6) is not of_weight


def test_frozen_weights_and_inputs_without_gradient_cost_no_product() -> None:
    narrow_one, _, arithmetic = layer(lambda: Int8Arithmetic("nearest", True))
    narrow_one.weight.requires_grad_(False)
    narrow_one(torch.randn(4, 64, requires_grad=True)).sum().backward()
    assert arithmetic.products == 2
    narrow_one.weight.requires_grad_(True)
    narrow_one(torch.randn(4, 64)).sum().backward()
    assert arithmetic.products == 4


def test_stochastic_gradients_are_right_in_the_mean_and_nearest_ones_are_not() -> None:
    """Most gradients are far below half a step: to the nearest they are all lost."""
    x, grad = torch.randn(256, 64), torch.full((256, 48), 1e-3)
    grad[:, 0] = 1.0
    means = {}
    for rounding in ("stochastic", "nearest"):
        narrow_one, plain_one, _ = layer(lambda rounding=rounding: Int8Arithmetic(rounding, True))
        plain_one.weight.data[0] = 0  # what is left of the gradient of the input comes from the small ones
        right = gradients(plain_one, x, grad)[1]
        found = torch.stack([gradients(narrow_one, x, grad)[1] for _ in range(150)]).mean(0)
        means[rounding] = error(found, right)
    assert means["nearest"] > 0.9
    assert means["stochastic"] < 0.4


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (1, 64, 48), (3, 5, 7), (17, 33, 130), (512, 8, 16)])
def test_int8_products_are_exact_for_any_shape(rows: int, inner: int, columns: int) -> None:
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((rows, inner), (inner, columns)))
    assert torch.equal(int8_product(a, b), (a.int() @ b.int()))
    assert torch.equal(int8_product(a, b.t().contiguous().t()), (a.int() @ b.int()))


def test_bitnet_multiplies_ternary_weights_with_normalised_inputs() -> None:
    narrow_one, plain_one, arithmetic = layer(TernaryArithmetic)
    arithmetic.watched = True
    x, grad = torch.randn(5, 64), torch.randn(5, 48)
    out, _, of_weight = gradients(narrow_one, x, grad)
    codes, scale = ternary_codes(plain_one.weight.detach())
    normalised = x / x.square().mean(-1, keepdim=True).sqrt()
    right = normalised @ (codes * scale).t() + plain_one.bias
    assert error(out, right) < 0.02
    assert arithmetic.products == 1
    assert set(arithmetic.counts) == {-1, 0, 1}
    assert sum(arithmetic.counts.values()) == 64 * 48
    assert error(of_weight, grad.t() @ normalised) < 0.02, "straight through"


def test_a_part_of_a_bitnet_weight_has_other_ternary_values_than_the_whole() -> None:
    """Why tensor parallelism is refused."""
    weight = torch.randn(64, 64) * torch.linspace(0.2, 3, 64).unsqueeze(1)
    whole, _ = ternary_codes(weight)
    first, _ = ternary_codes(weight[:32])
    assert not torch.equal(whole[:32], first)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_fake_quantization_computes_is_what_conversion_computes(bits: int) -> None:
    model = small()
    x = tokens()
    narrow(model, lambda: FakeArithmetic(bits), head=False)
    faked = model(x)
    convert(model, "int8_dynamic" if bits == 8 else "int4_weight_only", qat=f"int{bits}")
    kinds = {type(module) for module in model.modules()}
    assert (Int8DynamicLinear if bits == 8 else Int4WeightLinear) in kinds
    assert NarrowLinear not in kinds
    torch.testing.assert_close(model(x), faked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 9, 300])
@pytest.mark.parametrize(
    ("method", "bound"),
    [("int8_dynamic", 0.02), ("int8_static", 0.03), ("int8_weight_only", 0.012), ("int4_weight_only", 0.2)],
)
def test_converted_layers_are_near_what_they_were_for_any_number_of_rows(method: str, bound: float, rows: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 50))
    x = torch.randn(rows, 70)
    with torch.no_grad():
        right = model(x)
        convert(model, method, head=True, largest={"0": float(x.abs().amax())})
        assert error(model(x), right) < bound
        assert model(x[None]).shape == (1, rows, 50)


def test_fake_quantization_rounds_forward_and_lets_gradients_through() -> None:
    narrow_one, plain_one, arithmetic = layer(lambda: FakeArithmetic(4))
    assert isinstance(arithmetic, FakeArithmetic)
    x, grad = torch.randn(9, 64), torch.randn(9, 48)
    arithmetic.active = False
    found, right = gradients(narrow_one, x, grad), gradients(plain_one, x, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True)), "it has not begun"
    arithmetic.active = arithmetic.watched = True
    found, right = gradients(narrow_one, x, grad), gradients(plain_one, x, grad)
    assert 0.01 < error(found[0], right[0]) < 0.3
    assert error(found[1], right[1]) < 0.3
    assert error(found[2], right[2]) < 0.02, "inputs have 8 bits"
    assert len(arithmetic.counts) == 15


def test_weights_on_the_grid_stay_there() -> None:
    arithmetic, weight = GridArithmetic(), torch.randn(20, 30)
    assert off_grid(weight) > 0.3
    arithmetic.round_weight(weight, None)
    assert off_grid(weight) < 1e-3
    before = weight.clone()
    weight += 0.01 * torch.randn(20, 30)
    arithmetic.round_weight(weight, torch.Generator().manual_seed(0))
    assert off_grid(weight) < 1e-3
    assert not torch.equal(weight, before)


def test_rounding_after_an_update_keeps_its_mean() -> None:
    """An update of a twentieth of a step is never seen by nearest rounding; at random, one weight in twenty moves."""
    start = torch.randn(1, 2000).clamp_(-3.9, 3.9)
    start[0, 0] = 4.0
    arithmetic, noise = GridArithmetic(), torch.Generator().manual_seed(0)
    arithmetic.round_weight(start, None)
    step = 0.05 * 4.0 / 127
    moved = {}
    for name, generator in (("nearest", None), ("stochastic", noise)):
        weight = start.clone()
        for _ in range(20):
            weight[0, 1:] += step
            arithmetic.round_weight(weight, generator)
        moved[name] = float((weight - start)[0, 1:].mean()) / (20 * step)
    assert moved["nearest"] == pytest.approx(0, abs=1e-3)
    assert moved["stochastic"] == pytest.approx(1, abs=0.1)


def test_layers_keep_their_parameters_names_ties_and_places() -> None:
    model, before = small(), small()
    parameters = dict(model.named_parameters())
    names = narrow(model, GridArithmetic, head=False)
    assert names == ["first", "second", "back"]
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.head.weight is model.embedding.weight
    assert model.again is model.second
    assert type(model.head) is nn.Linear
    assert [(n, p.shape) for n, p in model.state_dict().items()] == [
        (n, p.shape) for n, p in before.state_dict().items()
    ]
    torch.testing.assert_close(model(tokens()), before(tokens()))
    dequantize(model)
    assert type(model.first) is nn.Linear
    assert model.again is model.second
    torch.testing.assert_close(model(tokens()), before(tokens()))


def test_the_last_layer_is_narrowed_on_request_only_and_nothing_to_narrow_is_an_error() -> None:
    assert [name for name, _ in chosen(small(), True)] == ["first", "second", "back", "head"]
    with pytest.raises(ValueError, match=r"quantization\.head"):
        narrow(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), GridArithmetic, head=False)


@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("sizes", [(64, 64, 64), (30, 60, 10), (1, 7, 9), (17, 8, 8)])
def test_operands_are_laid_out_as_cublas_multiplies_int8(
    turned: tuple[bool, bool], sizes: tuple[int, int, int]
) -> None:
    """Torch's own tests expect CUBLAS_STATUS_NOT_SUPPORTED of every other layout (test_linalg, `_int_mm`)."""
    rows, inner, columns = sizes
    torch.manual_seed(0)
    a = torch.randint(-127, 128, (inner, rows) if turned[0] else (rows, inner), dtype=torch.int8)
    b = torch.randint(-127, 128, (columns, inner) if turned[1] else (inner, columns), dtype=torch.int8)
    a, b = (a.t() if turned[0] else a), (b.t() if turned[1] else b)
    left, right = cublas_operands(a, b)
    assert left.is_contiguous()
    assert right.t().is_contiguous()
    assert left.shape[0] > 16
    assert all(size % 8 == 0 for size in (*left.shape, *right.shape))
    assert torch.equal((left.int() @ right.int())[:rows, :columns], a.int() @ b.int())
