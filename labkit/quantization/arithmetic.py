"""The products of inputs and weights in each low precision; see `linear.QuantizedLinearOp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from labkit.quantization.codes import (
    GROUP,
    INT4,
    INT8,
    int4_codes,
    int8_codes,
    on_int4,
    on_int8,
    scaled,
    ternary_codes,
)
from labkit.quantization.linear import Operand, QuantizedLinearOp


def _int8_operand(x: Tensor, share: str, kind: str = "int8") -> Operand:
    """Quantize a matrix to int8 with a scale for each row."""
    codes, scale = int8_codes(x.detach())
    return Operand(kind, codes, INT8, scale, share)


def _int4_operand(weight: Tensor) -> Operand:
    """Quantize a weight to int4, without the padding of its last group."""
    codes, scale = (part.expand(-1, -1, GROUP).flatten(1) for part in int4_codes(weight.detach()))
    inputs = weight.shape[1]
    return Operand("int4 grid", codes[:, :inputs], INT4, scale[:, :inputs], f"{GROUP} inputs")


class Int8Arithmetic(QuantizedLinearOp):
    """Computes all three products of a layer with int8 matrices; each operand has its own scale per row or column.

    out = x · wᵀ, dx = dout · w, dw = doutᵀ · x. Scales belong to dimensions that are not summed over, so they can be
    factored out of the sum: one per token and output forward, per token and input for dx, per output and input for dw.
    Gradients are rounded stochastically by default, because rounding to nearest loses small ones again and again.
    """

    def __init__(self, rounding: str, weight_gradient: bool) -> None:
        super().__init__()
        self._stochastic, self.weight_gradient = rounding == "stochastic", weight_gradient
        self.backward_bytes = (1, 1 if weight_gradient else 4)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = _Int8Product.apply(x.flatten(0, -2), weight, self)  # type: ignore[no-untyped-call]
        return out.unflatten(0, x.shape[:-1])

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Operand, Operand]:
        return _int8_operand(x, "token"), _int8_operand(weight, "row")

    def product(self, a: Tensor, b: Tensor, a_is_gradient: bool = False) -> Tensor:
        """Return the float product of a [m, k] and b [k, n], quantized by row of a and by column of b."""
        left, rows = int8_codes(a, 1, self.noise if a_is_gradient and self._stochastic else None)
        right, columns = int8_codes(b, 0)
        return scaled(self.multiply(left, right), a.dtype, rows, columns)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, arithmetic: Int8Arithmetic) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.arithmetic = arithmetic
        return arithmetic.product(x, weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        arithmetic: Int8Arithmetic = ctx.arithmetic
        x_grad = arithmetic.product(grad, weight, True) if ctx.needs_input_grad[0] else None
        weight_grad = None
        if ctx.needs_input_grad[1]:
            transposed = grad.t()
            weight_grad = arithmetic.product(transposed, x, True) if arithmetic.weight_gradient else transposed @ x
        return x_grad, weight_grad, None


class TernaryArithmetic(QuantizedLinearOp):
    """BitNet b1.58: ternary weights times int8 inputs, one int8 product forward; the backward pass is in float32.

    Inputs are normalised first (RMS, without a gain), then rounded per token. Gradients reach the float32 weight by a
    straight-through estimator.
    """

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        normalised = functional.rms_norm(x, x.shape[-1:]).flatten(0, -2)
        out: Tensor = _TernaryProduct.apply(normalised, weight, self)  # type: ignore[no-untyped-call]
        return out.unflatten(0, x.shape[:-1])

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Operand, Operand]:
        codes, scale = ternary_codes(weight.detach())
        return _int8_operand(functional.rms_norm(x, x.shape[-1:]), "token"), Operand("ternary", codes, 1, scale)


class _TernaryProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, arithmetic: TernaryArithmetic) -> Tensor:
        inputs, steps = int8_codes(x)
        codes, scale = ternary_codes(weight)
        arithmetic.note(codes)
        ctx.save_for_backward(inputs, steps, codes, scale)
        return arithmetic.multiply(inputs, codes.t()).to(x.dtype).mul_(steps).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, steps, codes, scale = ctx.saved_tensors
        x_grad = grad @ (codes.to(grad.dtype) * scale) if ctx.needs_input_grad[0] else None
        weight_grad = grad.t() @ (inputs.to(grad.dtype) * steps) if ctx.needs_input_grad[1] else None
        return x_grad, weight_grad, None


class FakeArithmetic(QuantizedLinearOp):
    """Quantization-aware training (Jacob et al. 2018, arXiv:1712.05877).

    Inputs and weights are rounded to the grid of the later conversion and multiplied in float; gradients use a
    straight-through estimator.

    Inputs: int8 per token. Weights: int8 per row, or int4 in groups of 32.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.active = True
        """Whether rounding has started; before that it is a plain float product."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.active:
            return functional.linear(x, weight)
        if self.watched:
            self.note((int4_codes if self.bits == 4 else int8_codes)(weight.detach())[0])
        on_grid = on_int4 if self.bits == 4 else on_int8
        return functional.linear(_through(x, on_int8(x.detach())), _through(weight, on_grid(weight.detach())))

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Operand, Operand]:
        if not self.active:
            return Operand.of(x), Operand.of(weight)
        inputs = _int8_operand(x, "token", "int8 grid")
        return inputs, _int4_operand(weight) if self.bits == 4 else _int8_operand(weight, "row", "int8 grid")


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return the value `rounded` with the gradient of x (the straight-through estimator, Bengio et al. 2013)."""
    out: Tensor = _Through.apply(x, rounded)  # type: ignore[no-untyped-call]
    return out


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class GridArithmetic(QuantizedLinearOp):
    """A float product with a weight on the int8 grid, to which `round_weight` rounds it after every optimizer step."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.watched:
            self.note(int8_codes(weight.detach())[0])
        return functional.linear(x, weight)

    def operands(self, x: Tensor, weight: Tensor) -> tuple[Operand, Operand]:
        return Operand.of(x), _int8_operand(weight, "row", "int8 grid")

    @torch.no_grad()
    def round_weight(self, weight: Tensor, generator: torch.Generator | None) -> None:
        """Round a weight, in place, to a neighbour on the grid; the largest weight of a row determines its scale."""
        weight.copy_(on_int8(weight, -1, generator))


def off_grid(weight: Tensor) -> float:
    """Return the maximum distance of a weight from the int8 grid of its row, in grid steps (at most 0.5)."""
    codes, scale = int8_codes(weight.detach())
    return float((weight.detach() / scale - codes).abs().amax()) if weight.numel() else 0.0
