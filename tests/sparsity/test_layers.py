"""Which weights may become zero."""

from __future__ import annotations

from torch import nn

from labkit.sparsity.layers import prunable
from labkit.workloads.models.gpt import gpt
from labkit.workloads.models.resnet import resnet


def test_the_inner_layers_of_a_network() -> None:
    names = set(prunable(resnet(1, 10, 16, 8, 1)))
    assert "blocks.stage1_1.convs.0.weight" in names
    assert not [name for name in names if "stem" in name or "head" in name or "bias" in name]
    model = gpt(64, 16, 32, 2, 4)
    inner = prunable(model)
    assert inner["blocks.layer_0.mlp.up.weight"] == (128, 32)
    assert len(inner) == 2 * 6
    assert set(prunable(model, ends=True)) - set(inner) == {"blocks.head.score.weight"}, "embeddings are no layers"


def test_experts_too_and_tied_or_frozen_weights_not() -> None:
    assert prunable(gpt(64, 16, 32, 1, 4, experts=4))["blocks.layer_0.mlp.experts.up"] == (4, 128, 32)
    assert "blocks.head.score.weight" not in prunable(gpt(64, 16, 32, 1, 4, tied=True), ends=True)
    chain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    chain[1].weight.requires_grad = False
    assert list(prunable(chain)) == ["2.weight"], "without blocks, the first and the last such weight are the ends"
