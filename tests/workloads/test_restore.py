"""What a model held before it was tried is there again afterwards, however deep it lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from labkit.workloads import restore
from labkit.workloads.restore import restored, undisturbed

CPU = torch.device("cpu")


class Lazy(nn.Module):
    """A buffer and a module that are there from the first pass on only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)
        self.more = nn.ModuleDict()
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = x.detach().std()
            self.register_buffer("offset", x.detach().mean())
            self.more["late"] = nn.BatchNorm1d(4)
        self.cache[f"pass {len(self.cache)}"] = x
        return self.more["late"](x) * self.scale


class Outside:
    """An object of no kind of torch's that holds a module and a list in a list."""

    def __init__(self) -> None:
        self.norm = nn.BatchNorm1d(4)
        self.rows = [[{"passes": [0]}]]


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.outside = Outside() if depth % 2 else None
        self.inner: nn.Module = Deep(depth - 1) if depth else nn.Sequential(nn.Sequential(nn.BatchNorm1d(4)), Lazy())
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.old = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.register_buffer("shown", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.outside is not None:
            x = self.outside.norm(x)
            self.outside.rows[0][0]["passes"].append(1)
        return self.old(self.spectral(self.inner(x))) * self.shown


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a pass could have changed."""
    outside = {
        f"{name} {key}": value.clone()
        for name, module in model.named_modules()
        if isinstance(module, Deep) and module.outside is not None
        for key, value in module.outside.norm.state_dict().items()
    }
    lists = [len(module.outside.rows[0][0]["passes"]) for module in model.modules() if getattr(module, "outside", 0)]
    caches = [list(module.cache) for module in model.modules() if isinstance(module, Lazy)]
    tensors = {name: value.clone() for name, value in model.state_dict().items()} | outside
    return {"tensors": tensors, "modules": list(dict(model.named_modules())), "lists": lists, "caches": caches}


@pytest.mark.parametrize("depth", [0, 5, 9])
@pytest.mark.parametrize("weights", [True, False])
def test_a_deep_model_is_as_it_was(depth: int, weights: bool) -> None:
    model = nn.Sequential(nn.Sequential(Deep(depth)), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    before = everything(model)
    with restored(model, device=CPU, weights=weights) as snapshot:
        for _ in range(2):
            model.train()(x).sum().backward()
            snapshot.undo()
            again = everything(model)
            assert again["modules"] == before["modules"]
        model.train()(x).sum().backward()
        model.eval()
    after = everything(model)
    tensors, same = after.pop("tensors"), before.pop("tensors")
    assert after == before
    assert tensors.keys() == same.keys()
    for name, value in tensors.items():
        assert torch.equal(value, same[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_tensor_that_stores_a_number_once_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.zeros(1, 1).expand(3, 3))
    with undisturbed(model):
        model.mask = torch.ones(3, 3)
    assert model.mask.shape == (3, 3)
    assert not model.mask.any()


def test_generators_may_go_on_while_the_rest_is_put_back() -> None:
    model = nn.BatchNorm1d(2)
    model.draws = torch.Generator().manual_seed(0)
    with undisturbed(model) as snapshot:
        drawn = torch.rand((), generator=model.draws)
        model(torch.randn(4, 2))
        snapshot.undo(generators=False)
        assert model.num_batches_tracked == 0
        assert torch.rand((), generator=model.draws) != drawn
        snapshot.undo()
        assert torch.rand((), generator=model.draws) == drawn


def test_what_is_too_large_to_be_copied_and_changes_all_the_same_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "MAX_WEIGHT_BYTES", 10)
    monkeypatch.setattr(restore, "LARGE_TENSOR", 10)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = model[1].bias.clone()
    with undisturbed(model) as snapshot, torch.no_grad():
        assert not snapshot.has_weights
        assert not snapshot.lost()
        model[1].weight.add_(1)
        model[1].bias.add_(1)
        assert [id(tensor) for tensor in snapshot.lost()] == [id(model[1].weight)]
    assert torch.equal(model[1].bias, before), "small ones are copied"
