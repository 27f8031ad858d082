"""The trained network in its forms: what is measured of each, with a stand-in where a GPU would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from labkit.experiment import Sparsity
from labkit.experiment.registry import registry
from labkit.sparsity import export, two_four
from labkit.sparsity.csr import CsrLinear
from labkit.sparsity.n_m import n_of_m
from labkit.sparsity.two_four import SemiStructuredLinear
from labkit.training.after import exported, variants
from labkit.workloads.base import Task

NAMES = ["up", "down"]


def task(seed: int = 0) -> Task:
    """A small language task."""
    room = registry("workload")["language"].load()
    given = {"width": 64, "depth": 3, "heads": 4, "context": 16, "max_characters": 4000}
    made: Task = room.build(room.Options(**given), seed)
    return made


def prune(model: nn.Module) -> None:
    """2:4 in the MLP in the middle."""
    with torch.no_grad():
        for name in NAMES:
            weight = model.get_parameter(f"blocks.layer_1.mlp.{name}.weight")
            weight.mul_(n_of_m(weight, 2, 4))


class Packed(torch.Tensor):
    """A weight that says what a GPU would hold of it, and multiplies as the dense one."""

    packed: Tensor
    meta: Tensor | None

    @staticmethod
    def of(weight: Tensor) -> Packed:
        made = weight.detach().clone().as_subclass(Packed)
        made.packed, made.meta = weight[:, ::2].clone().as_subclass(torch.Tensor), None
        return made

    def to_dense(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "PATIENCE_S", 0.0)
    monkeypatch.setattr(exported, "BATCHES", (1, 4))


def made(wanted: Task, method: str, path: Path) -> dict[str, Any]:
    asked: list[None] = []
    settings = Sparsity.model_validate({"method": method, "target": 0.5 if method != "n_m" else 0.0, "export": True})
    found = exported.export(wanted, wanted.model, settings, path, lambda: asked.append(None))
    assert asked, "the rank shows that it lives"
    return found


@pytest.mark.usefixtures("quick")
def test_two_four_stands_beside_the_dense_one_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = task()
    prune(wanted.model)
    monkeypatch.setattr(two_four, "kernels", lambda device: (Packed, ""))
    monkeypatch.setattr(two_four, "compress", Packed.of)
    monkeypatch.setattr(export, "faster_as_csr", lambda model, x, heartbeat: [])
    found = made(wanted, "n_m", tmp_path / "it")
    assert found["layers"] == {"dense": 0, "dense_16": 2, "two_four": 2}
    weights = 2 * 64 * 256
    assert found["bytes"]["dense"] - found["bytes"]["dense_16"] == 2 * weights
    assert found["bytes"]["dense_16"] - found["bytes"]["two_four"] == weights
    assert found["metrics"]["two_four"] == found["metrics"]["dense_16"]
    assert found["metrics"]["two_four"]["loss"] == pytest.approx(found["metrics"]["dense"]["loss"], abs=0.01)
    assert set(found["latency_seconds"]["4"]) == {"dense", "dense_16", "two_four"}
    # Packed again where there is a kernel, whole where there is none: the same numbers.
    names = export.layers_with_two_four(variants.unwrap_copy(wanted.model))
    packed = export.as_half(variants.unwrap_copy(wanted.model), names, sparse=True)
    export.save(tmp_path / "packed", packed, "two_four")
    outputs = []
    for here in (Packed, None):
        monkeypatch.setattr(two_four, "kernels", lambda device, here=here: (here, ""))
        other = task(1).model
        assert export.load(tmp_path / "packed", other) == "two_four"
        layer: Any = other.get_submodule("blocks.layer_1.mlp.up")
        assert (layer.packed is not None) == (here is not None)
        outputs.append(other.eval()(wanted.test.__getitems__([0, 1])["x"]))
    assert torch.equal(outputs[0].as_subclass(torch.Tensor), outputs[1])


@pytest.mark.usefixtures("quick")
def test_where_nothing_is_faster_the_dense_network_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = task()
    monkeypatch.setattr(export, "faster_as_csr", lambda model, x, heartbeat: [])
    found = made(wanted, "rigl", tmp_path / "it")
    assert (found["saved"], found["csr_layers"]) == ("dense", {"1": 0, "4": 0})
    assert set(found["metrics"]) == {"dense"}
    other = task(1).model
    assert export.load(tmp_path / "it", other) == "dense"
    for name, parameter in wanted.model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.usefixtures("quick")
def test_a_form_is_that_of_the_largest_batch_for_which_it_gains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = task()
    prune(wanted.model)
    names = [f"blocks.layer_1.mlp.{name}" for name in NAMES]
    monkeypatch.setattr(export, "faster_as_csr", lambda model, x, heartbeat: names[: len(x)] if len(x) == 1 else [])
    found = made(wanted, "static", tmp_path / "it")
    assert found["csr_layers"] == {"1": 1, "4": 0}
    assert found["layers"] == {"dense": 0, "csr": 1}
    assert [set(found["latency_seconds"][size]) for size in ("1", "4")] == [{"dense", "csr"}, {"dense"}]
    assert found["saved"] == "dense"


def test_a_bare_copy_has_ordinary_layers_whatever_the_network_trained_with() -> None:
    wanted = task()
    prune(wanted.model)
    x = wanted.test.__getitems__([0, 1])["x"]
    expected = wanted.model.eval()(x)
    up, down = (wanted.model.get_submodule(f"blocks.layer_1.mlp.{name}") for name in NAMES)
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    export.replace_module(wanted.model, "blocks.layer_1.mlp.up", CsrLinear(up, up.weight != 0))
    export.replace_module(wanted.model, "blocks.layer_1.mlp.down", SemiStructuredLinear(down))
    copy = variants.unwrap_copy(wanted.model)
    assert {type(part) for part in copy.modules() if "Linear" in type(part).__name__} == {nn.Linear}
    assert torch.equal(copy(x), expected)
    assert isinstance(wanted.model.get_submodule("blocks.layer_1.mlp.up"), CsrLinear), "the network itself stays"
