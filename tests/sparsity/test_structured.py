"""Whole units and heads go, and the smaller network computes the same."""

from __future__ import annotations

import torch

from labkit.sparsity.structured import shrink, units_of
from labkit.workloads.models.gpt import gpt


def test_the_shrunk_network_computes_the_same_with_fewer_weights() -> None:
    torch.manual_seed(0)
    model = gpt(64, 16, 32, 2, 4).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                module.bias.normal_()
    before = sum(parameter.numel() for parameter in model.parameters())
    gone = {128: [3, 5, 70], 4: [1]}  # hidden units, heads
    with torch.no_grad():
        for units in units_of(model):
            for unit in gone[units.count]:
                for name in units.into:
                    model.get_parameter(name).view(units.count, -1, 32)[unit] = 0
                model.get_parameter(units.out).view(32, units.count, -1)[:, unit] = 0
    tokens = torch.randint(64, (3, 16))
    expected = model(tokens)
    found = shrink(model)(tokens)
    assert (expected - found).abs().max() < 1e-12
    # Of each of two layers: three units of 32 + 1 + 32 numbers, one head of 8 with 3 · (32 + 1) + 32 numbers a row.
    assert before - sum(parameter.numel() for parameter in model.parameters()) == 2 * (3 * 65 + 8 * (3 * 33 + 32))


def test_heads_and_hidden_units_are_units() -> None:
    model = gpt(64, 16, 32, 1, 4)
    assert [(units.count, len(units.into)) for units in units_of(model)] == [(4, 3), (128, 1)]
