"""What a run says to be in force is measured: switch the mechanism off, and the proof fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from labkit.quantization import arithmetic, optimizers
from labkit.quantization.codes import int8_codes
from labkit.quantization.narrowing import PrecisionController
from labkit.training.optimizers import make_optimizer
from tests.quantization.networks import small, tokens, wanted

CPU = torch.device("cpu")
STEPS = 4
PER_UPDATE = 4
"""Layers of the network are used so often in a pass, its last one left out: the second one twice."""


def trained(*assignments: str) -> dict[str, Any]:
    """A few updates as the trainer makes them; what is found to be in force."""
    experiment = wanted(*assignments)
    narrowing = PrecisionController(experiment, 0, STEPS, CPU)
    model = small().to(narrowing._format.dtype())
    narrowing.convert(model)
    pairs = [(parameter, parameter.dim() > 1) for parameter in model.parameters()]
    optimizer = make_optimizer(experiment.optimizer, pairs, narrowing.optimizer())
    narrowing.start([model], optimizer, 0)
    for step in range(STEPS):
        narrowing.begin(step)
        x = tokens(64, step)
        loss = nn.functional.cross_entropy(model(x), (x + 1) % 24)
        assert loss.dtype != torch.bfloat16
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        narrowing.after_update()
    with torch.no_grad():
        model(tokens())  # an evaluation belongs to no update
    return narrowing.statistics()


def test_full_precision_has_nothing_to_prove() -> None:
    assert trained() == {}
    assert trained("quantization.training=fp64") == {}


def test_int8_products_are_counted_where_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained("quantization.training=int8")
    assert found["int8_products"] == 3 * PER_UPDATE
    assert found["narrow_layers"] == 3, "the second one stands in two places"
    assert trained("quantization.training=int8", "quantization.weight_gradient=false")["int8_products"] == (
        2 * PER_UPDATE
    )
    monkeypatch.setattr(arithmetic.Int8Arithmetic, "__call__", lambda self, x, weight: nn.functional.linear(x, weight))
    assert "int8_products" not in trained("quantization.training=int8")


def test_bitnet_shows_three_values_and_how_often_they_stand_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained("quantization.training=bitnet")
    assert found["weight_values"] == 3
    shares = [float(part.partition(": ")[2].rstrip("%")) for part in found["ternary"].split(", ")]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert min(shares) > 10
    assert found["int8_products"] == PER_UPDATE

    def not_ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = int8_codes(weight)
        return codes, scale.mean()

    monkeypatch.setattr(arithmetic, "ternary_codes", not_ternary)
    found = trained("quantization.training=bitnet")
    assert found["weight_values"] > 3
    assert "ternary" not in found


@pytest.mark.parametrize(("bits", "values"), [(8, 200), (4, 15)])
def test_fake_quantization_shows_how_many_values_weights_have(bits: int, values: int) -> None:
    found = trained(f"quantization.qat=int{bits}")
    assert values <= found["weight_values"] <= (255 if bits == 8 else 15)
    late = trained(f"quantization.qat=int{bits}", "quantization.qat_start=0.5")
    assert "weight_values" in late


def test_fake_quantization_that_never_begins_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic.FakeArithmetic, "__call__", lambda self, x, weight: nn.functional.linear(x, weight))
    assert "weight_values" not in trained("quantization.qat=int4")


def test_weights_lie_on_the_grid_only_if_they_are_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained("quantization.training=int8_weights")
    assert found["weights_on_grid"] == "3 of 3"
    assert "float32" in found["emulated"]
    monkeypatch.setattr(arithmetic.GridArithmetic, "round_weight", lambda self, weight, generator: None)
    assert trained("quantization.training=int8_weights")["weights_on_grid"] == "0 of 3"


def test_pure_bf16_shows_its_types_and_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained("quantization.training=pure_bf16")
    assert [found[name] for name in ("weights", "gradients", "activations")] == ["bfloat16"] * 3
    assert 0.02 < found["rounded_against_nearest"] < 0.5
    assert found["optimizer_state_bits"] == 32
    monkeypatch.setattr(optimizers, "to_bfloat16", lambda x, generator=None: x.to(torch.bfloat16))
    assert trained("quantization.training=pure_bf16")["rounded_against_nearest"] == 0


def test_the_state_shows_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained("optimizer.state_bits=8")
    assert found["weights"] == "float32"
    assert 8 < found["optimizer_state_bits"] < 12, "three of four weights are large enough"
    monkeypatch.setattr(optimizers, "SMALLEST", 10**9)
    assert trained("optimizer.state_bits=8")["optimizer_state_bits"] == 32


def test_the_same_place_draws_the_same_and_another_one_does_not() -> None:
    ends = []
    for place in (0, 0, 1):
        narrowing = PrecisionController(wanted("quantization.training=int8"), place, STEPS, CPU)
        model = small()
        narrowing.convert(model)
        narrowing.start([model], torch.optim.SGD(model.parameters()), 0)
        narrowing.begin(2)
        nn.functional.cross_entropy(model(tokens()), tokens()).backward()
        grad = model.first.weight.grad
        assert grad is not None
        ends.append(grad)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
