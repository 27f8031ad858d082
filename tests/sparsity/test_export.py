"""After the training every form of the network computes the same, and comes back from its file doing so."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from labkit.experiment.registry import registry
from labkit.quantization.converted import num_bytes
from labkit.runs import Run
from labkit.sparsity import export
from labkit.sparsity.choose import random_mask
from labkit.sparsity.csr import CsrLinear
from labkit.sparsity.two_four import SemiStructuredLinear
from labkit.workloads.models.gpt import gpt
from tests.launch.helpers import changed_ranks
from tests.sparsity.test_methods import experiment, finished
from tests.training.conftest import one_thread  # noqa: F401

WITHIN = 1e-4
TOKENS = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))


def network(part: float = 0.1) -> nn.Module:
    """A GPT of which each linear layer keeps this part of its weights."""
    torch.manual_seed(0)
    model = gpt(64, 16, 32, 2, 4)
    with torch.no_grad():
        for number, module in enumerate(model.modules()):
            if isinstance(module, nn.Linear):
                module.weight.mul_(random_mask(tuple(module.weight.shape), round(part * module.weight.numel()), number))
    return model.eval()


def fresh() -> nn.Module:
    torch.manual_seed(1)
    return gpt(64, 16, 32, 2, 4).eval()


def test_csr_layers_compute_the_same_in_fewer_bytes_and_come_back(tmp_path: Path) -> None:
    model = network()
    names = export.layers_with_zeros(model)
    made = export.as_csr(model, names)
    assert (model(TOKENS) - made(TOKENS)).abs().max() < 1e-5
    layer: Any = made.get_submodule(names[0])
    kept = round(0.1 * 32 * 32)
    assert layer.values.dtype == torch.float32
    assert layer.columns.dtype == layer.ends.dtype == torch.int32
    assert (len(layer.values), len(layer.columns), len(layer.ends)) == (kept, kept, 33)
    assert num_bytes(made) < 0.5 * num_bytes(model)
    path = tmp_path / "exported.safetensors"
    size = export.save(path, made, "csr")
    assert size == path.stat().st_size < num_bytes(made) + 20_000
    other = fresh()
    assert export.load(path, other) == "csr"
    assert torch.equal(other(TOKENS), made(TOKENS))


def test_a_smaller_network_comes_back(tmp_path: Path) -> None:
    model = network(1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("mlp.up.weight", "mlp.up.bias")):
                parameter[5:70] = 0
            if name.endswith("mlp.down.weight"):
                parameter[:, 5:70] = 0
    made = export.as_smaller(model)
    assert num_bytes(made) < num_bytes(model)
    export.save(tmp_path / "it", made, "smaller")
    other = fresh()
    assert export.load(tmp_path / "it", other) == "smaller"
    assert torch.equal(other(TOKENS), made(TOKENS))
    assert (model(TOKENS) - made(TOKENS)).abs().max() < 1e-5
    assert {p.shape for p in other.parameters()} == {p.shape for p in made.parameters()}


def test_layers_in_16_bits_come_back(tmp_path: Path) -> None:
    model = network()
    made = export.as_half(model, export.layers_with_zeros(model), sparse=False)
    assert 0 < (model(TOKENS) - made(TOKENS)).abs().max() < 0.1
    export.save(tmp_path / "it", made, "dense_16")
    other = fresh()
    assert export.load(tmp_path / "it", other) == "dense_16"
    assert torch.equal(other(TOKENS), made(TOKENS))


def test_layers_that_train_with_kernels_become_ordinary_again() -> None:
    model = network()
    mixed = copy.deepcopy(model)
    layer = mixed.get_submodule("blocks.layer_0.mlp.up")
    assert isinstance(layer, nn.Linear)
    export.replace_module(mixed, "blocks.layer_0.mlp.up", CsrLinear(layer, layer.weight != 0))
    other = mixed.get_submodule("blocks.layer_1.mlp.up")
    assert isinstance(other, nn.Linear)
    export.replace_module(mixed, "blocks.layer_1.mlp.up", SemiStructuredLinear(other))
    export.densify(mixed)
    assert {type(m) for m in mixed.modules() if "Linear" in type(m).__name__} == {nn.Linear}
    assert torch.equal(mixed(TOKENS), model(TOKENS))


def test_a_layer_becomes_csr_only_where_that_is_faster() -> None:
    """1,024 x 1,024 with 2 % of the weights: several times faster; with nearly all of them: several times slower."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024))
    with torch.no_grad():
        model[0].weight.mul_(random_mask((1024, 1024), 20_000, 0))
        model[2].weight[0, 0] = 0
    assert export.layers_with_zeros(model) == ["0", "2"]
    assert export.faster_as_csr(model, torch.zeros(256, 1024)) == ["0"]


def test_a_weight_in_two_places_stays() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    assert export.layers_with_zeros(model) == ["0"]
    model[1].weight = model[0].weight
    assert export.layers_with_zeros(model) == []


# -- files that are not believed --------------------------------------------------------------------------------------


def changed(path: Path, about: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """The file with other metadata or tensors (by the end of their name; None takes one away)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["labkit"])
    held = load_file(path)
    for end, tensor in tensors.items():
        name = next(name for name in held if name.endswith(end))
        del held[name]
        if tensor is not None:
            held[name] = tensor
    other = path.with_name("changed")
    save_file(held, other, {"labkit": json.dumps(said | (about or {}))})
    return other


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = network()
    path = tmp_path / "exported.safetensors"
    export.save(path, export.as_csr(model, export.layers_with_zeros(model)), "csr")
    columns = next(value for name, value in load_file(path).items() if name.endswith("columns"))
    beyond = columns.clone()
    beyond[-1] = 10_000
    (tmp_path / "text").write_text("no tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    for wrong in (
        tmp_path / "missing",
        tmp_path / "text",
        tmp_path / "foreign",
        changed(path, {"format": 99}),
        changed(path, {"csr": {"nowhere": 3}}),
        changed(path, {"csr": ["x"]}),
    ):
        with pytest.raises(ValueError, match="not an exported network"):
            export.load(wrong, fresh())
    with pytest.raises(ValueError, match="not an exported network"):
        export.load(changed(path, columns=beyond), fresh())
    with pytest.raises(ValueError, match="not an exported network"):
        export.load(changed(path, ends=None), fresh())
    with pytest.raises(ValueError, match="another shape"):
        export.load(path, gpt(64, 16, 64, 2, 4))
    with pytest.raises(ValueError, match="missing or unexpected"):
        export.load(path, gpt(64, 16, 32, 3, 4))


# -- runs -------------------------------------------------------------------------------------------------------------

_ALL_FASTER = """
from labkit.sparsity import export
export.faster_as_csr = lambda model, x, alive: export.layers_with_zeros(model) if len(x) > 1 else []
"""


def check(run: Run, forms: set[str]) -> dict[str, Any]:
    """Every form has the metrics of the dense one, and the file computes what the evaluation saw."""
    found: dict[str, Any] = run.summary()["exported"]
    assert set(found["metrics"]) == set(found["bytes"]) == set(found["layers"]) == forms
    last = run.data().evaluations[-1][2]
    for form, metrics in found["metrics"].items():
        assert metrics["loss"] == pytest.approx(found["metrics"]["dense"]["loss"], abs=WITHIN), form
    assert found["metrics"]["dense"]["loss"] == pytest.approx(last["loss"], abs=WITHIN)
    assert set(found["latency_seconds"]) == set(found["fastest"]) == {"1", "32", "512"}
    for size, seconds in found["latency_seconds"].items():
        assert found["fastest"][size] == min(seconds, key=seconds.__getitem__)
    assert found["saved"] == found["fastest"]["512"]
    assert found["file_bytes"] == run.directory.exported.stat().st_size
    workload = run.experiment.workload
    room = registry("workload")[workload.name].load()
    task = room.build(room.Options(**workload.options), seed=7)
    assert export.load(run.directory.exported, task.model) == found["saved"]
    sums: dict[str, float] = {}
    with torch.no_grad():
        batch = task.test.__getitems__(list(range(min(len(task.test), 256))))
        for name, value in task.evaluate(task.model.eval()(batch["x"]), batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    if len(task.test) <= 256:
        assert task.metrics(sums)["loss"] == pytest.approx(last["loss"], abs=WITHIN)
    return found


@pytest.mark.parametrize(
    ("method", "layout", "more"),
    [
        ("rigl", {"dp_replicate": 2}, {}),
        (
            "static",
            {"dp_replicate": 2},
            {"sparsity": {"method": "static", "target": 0.8, "kernel": "csr", "export": True}},
        ),
        ("n_m", {"dp_shard": 2, "zero_stage": 2}, {}),
    ],
)
def test_a_sparse_run_leaves_its_forms(
    method: str, layout: dict[str, Any], more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"sparsity.export": True, "quantization.training": "fp32"} | more
    monkeypatch.setenv("LABKIT_TEST_CHANGE", _ALL_FASTER)
    with changed_ranks(tmp_path):
        run = finished(experiment(method, layout, **changes))
    found = check(run, {"dense", "csr"})
    assert found["csr_layers"] == {"1": 0, "32": found["layers"]["csr"], "512": found["layers"]["csr"]}
    assert found["layers"]["csr"] == 12
    assert set(found["latency_seconds"]["1"]) == {"dense"}
    if method != "n_m":  # half of the weights, each with a column of 4 bytes, are as many bytes
        assert found["bytes"]["csr"] < found["bytes"]["dense"]


def test_a_structured_run_leaves_a_smaller_network(tmp_path: Path) -> None:
    run = finished(experiment("structured", **{"sparsity.export": True, "quantization.training": "fp32"}))
    forms = set(run.summary()["exported"]["metrics"])
    found = check(run, forms | {"smaller"})
    assert found["layers"]["smaller"] > 0
    assert found["bytes"]["smaller"] < 0.8 * found["bytes"]["dense"]


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("rigl", {"layout": {"tp": 2}}, "with tp it has only a part"),
        ("rigl", {"layout": {"pp": 2, "microbatches": 2}}, "with pp it has only a part"),
        ("gradual", {"layout": {"dp_shard": 2}}, "with ZeRO stage 3"),
        ("n_m", {"layout": {"pp": 2, "microbatches": 2}}, "with pp it has only a part"),
        ("static", {"layout": {"dp_replicate": 2}, "launch.isolated": True}, "do not train together"),
        ("magnitude", {"quantization.training": "bitnet"}, "trained in bitnet"),
        ("static", {"sparsity.method": "none"}, "sparsity.method is none"),
    ],
)
def test_what_cannot_be_exported_is_refused(method: str, changes: dict[str, Any], said: str) -> None:
    found = experiment(method, **({"sparsity.export": True} | changes)).problems()
    assert [said in problem.reason for problem in found if problem.field == "sparsity.export"] == [True]
