"""What static quantization knows of its inputs beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from labkit.quantization.calibration import magnitudes
from labkit.quantization.converted import Int8StaticLinear, convert


def two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def test_of_all_batches_the_largest_is_kept_and_no_hook() -> None:
    model = two()
    batches = [torch.full((4, 16), 0.5), torch.full((4, 16), -3.0), torch.full((4, 16), 1.0)]
    asked = []
    found = magnitudes(model, ["0", "2"], batches, 1.0, lambda: asked.append(1))
    assert found["0"] == 3.0
    with torch.no_grad():
        assert found["2"] == pytest.approx(max(float(model[:2](batch).max()) for batch in batches))
    assert len(asked) == 3
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_quantile_leaves_outliers_out_and_so_rounds_all_others_finer() -> None:
    model = two()
    torch.manual_seed(1)
    x = torch.randn(500, 16)
    x[0, 0] = 1000.0
    whole, most = (magnitudes(model, ["0"], [x], quantile, lambda: None)["0"] for quantile in (1.0, 0.999))
    assert whole == 1000.0
    assert 2.5 < most < 5
    off = {}
    usual = x[1:]  # without the outlier
    for largest in (whole, most):
        layer = Int8StaticLinear(model[0], largest)
        with torch.no_grad():
            off[largest] = float((layer(usual) - model[0](usual)).norm() / model[0](usual).norm())
    assert off[most] < 0.02
    assert off[whole] > 10 * off[most]


def test_what_is_beyond_is_clipped() -> None:
    layer = Int8StaticLinear(nn.Linear(4, 2, bias=False), 1.0)
    with torch.no_grad():
        assert torch.equal(layer(torch.full((1, 4), 50.0)), layer(torch.full((1, 4), 1.0)))


def test_without_calibration_it_cannot_be_converted() -> None:
    with pytest.raises(KeyError):
        convert(two(), "int8_static", head=True)
