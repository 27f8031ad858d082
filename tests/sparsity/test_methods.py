"""Every method makes zero what it was asked for, in every layout the same, and goes on from a checkpoint exactly."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labkit.experiment import Experiment
from labkit.experiment.recipes import recipe
from labkit.launch import launch
from labkit.parallel.entries import OptimizerShards
from labkit.runs import Run
from labkit.sparsity.masks import Masks

EXACT = 1e-9
STEPS = 12
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "target": 0.8},
    "magnitude, layer": {"method": "magnitude", "target": 0.8, "scope": "layer"},
    "gradual": {"method": "gradual", "target": 0.8, "every": 2},
    "static": {"method": "static", "target": 0.8, "distribution": "erk"},
    "set": {"method": "set", "target": 0.8, "every": 3},
    "rigl": {"method": "rigl", "target": 0.8, "every": 3},
    "n_m": {"method": "n_m"},
    "block": {"method": "block", "target": 0.5, "size": 8, "every": 4},
    "structured": {"method": "structured", "target": 0.5, "every": 4},
}
SPARSE = {name: options.get("target", 0.5) for name, options in METHODS.items()}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp_replicate": 2},
    "dp4": {"dp_replicate": 4},
    "zero1": {"dp_shard": 2, "zero_stage": 1},
    "zero2": {"dp_shard": 2, "zero_stage": 2},
    "zero3": {"dp_shard": 2},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2, "microbatches": 2},
    "dp2·pp2": {"dp_replicate": 2, "pp": 2, "microbatches": 2},
    "shard2·tp2": {"dp_shard": 2, "tp": 2},
}


def experiment(method: str, layout: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    return recipe("language-ddp").set(
        {
            "workload.depth": 2,
            "workload.width": 32,
            "workload.context": 32,
            "layout": layout or {},
            "sparsity": METHODS[method],
            "training.steps": STEPS,
            "training.global_batch": 16,
            "training.evaluate_every": STEPS,
            "training.checkpoint_every": STEPS,
            "training.gradient_norm": True,
            "optimizer.schedule": "constant",
            "quantization.training": "fp64",
        }
        | {name.replace("__", "."): value for name, value in changes.items()}
    )


def finished(wanted: Experiment, resume: Run | None = None) -> Run:
    run = launch(wanted, baseline=None, **({"resume": resume} if resume else {}))
    run.result(timeout=120)
    return run


@lru_cache
def alone(method: str) -> Run:
    return finished(experiment(method))


def weights(run: Run, step: int = STEPS) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(run.directory.checkpoint(step).glob("model*.safetensors")):
        found |= load_file(path)
    return {name: value for name, value in found.items() if ".layer_" in name and value.dim() == 2}


@pytest.mark.parametrize("method", METHODS)
def test_as_many_weights_are_zero_as_were_asked_for(method: str) -> None:
    run = alone(method)
    saved = weights(run)
    zeros = sum(int((value == 0).sum()) for value in saved.values()) / sum(value.numel() for value in saved.values())
    assert zeros == pytest.approx(SPARSE[method], abs=0.002)
    assert run.summary()["effective"]["sparsity"] == pytest.approx(zeros, abs=1e-12)
    assert run.data().sparsity[-1][0] <= STEPS
    assert run.summary()["metrics"]["loss"] < run.data().loss[0], "and it learns"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["rigl", "gradual"])
def test_every_layout_trains_the_same_sparse_network(method: str, layout: str) -> None:
    one, other = alone(method), finished(experiment(method, LAYOUTS[layout]))
    for name in ("loss", "grad_norm"):
        assert np.abs(getattr(one.data(), name) - getattr(other.data(), name)).max() <= EXACT
    changes = len(other.data().sparsity) - 1  # the last entry is a count without a change
    compared = other.summary()["effective"].get("masks_equal_on_ranks", "0")
    assert int(compared) == (0 if layout == "pp2" else changes), "where several ranks hold the same weights"
    ours, theirs = weights(one), weights(other)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value == 0, theirs[name] == 0), "to the last zero"


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        ("set", "dp2"),
        ("static", "pp2"),
        ("magnitude", "pp2"),
        ("n_m", "zero1"),
        ("block", "tp2"),
        ("structured", "tp2"),
        ("structured", "pp2"),
    ],
)
def test_so_do_the_other_methods(method: str, layout: str) -> None:
    one, other = alone(method), finished(experiment(method, LAYOUTS[layout]))
    assert np.abs(one.data().loss - other.data().loss).max() <= EXACT


@pytest.mark.parametrize(
    ("method", "layout"), [("rigl", "dp2"), ("set", "dp2·pp2"), ("gradual", "zero1"), ("n_m", "dp2")]
)
def test_a_resumed_run_goes_on_exactly(method: str, layout: str) -> None:
    """In the middle of changes: what has just grown is zero too, and is no pruned weight."""
    whole = finished(experiment(method, LAYOUTS[layout], training__checkpoint_every=6, training__keep_checkpoints=9))
    shutil.rmtree(whole.directory.checkpoint(STEPS))
    again = finished(whole.experiment, resume=whole)
    assert np.abs(again.data().loss - whole.data().loss[6:]).max() <= EXACT
    assert again.summary()["effective"]["sparsity"] == whole.summary()["effective"]["sparsity"]


def test_a_sparse_network_goes_on_in_another_layout() -> None:
    whole = finished(experiment("rigl", LAYOUTS["dp2·pp2"], training__checkpoint_every=6, training__keep_checkpoints=9))
    shutil.rmtree(whole.directory.checkpoint(STEPS))
    again = finished(experiment("rigl", LAYOUTS["zero1"]), resume=whole)
    assert np.abs(again.data().loss - whole.data().loss[6:]).max() <= EXACT


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_less_and_less_changes_and_then_nothing(method: str) -> None:
    run = finished(experiment(method, training__steps=40))
    changes = [(step, np.mean([churn for _, _, churn in layers.values()])) for step, layers in run.data().sparsity]
    assert changes[0][0] == 0
    assert changes[-1] == (40, 0.0), "the last count"
    steps, churn = zip(*changes[1:-1], strict=True)
    assert list(steps) == list(range(3, 30, 3))
    assert churn[0] > churn[-1]
    assert max(churn) <= 0.3


def test_of_two_in_four_half_are_zero_all_along() -> None:
    """The weights that the network uses are counted, not those from which they are chosen."""
    for _, layers in alone("n_m").data().sparsity:
        assert sum(zeros for zeros, _, _ in layers.values()) == sum(size for _, size, _ in layers.values()) / 2


@pytest.mark.parametrize(
    "update", [{"method": "local_sgd", "every": 3}, {"method": "diloco", "every": 2}, {"method": "streaming_diloco"}]
)
def test_ranks_that_train_alone_share_a_random_mask(update: dict[str, Any]) -> None:
    """What a rule remembers of the weights is masked, too: an outer step brings nothing back."""
    changes: dict[str, Any] = {"gradients__update": update, "quantization__training": "fp32"}
    run = finished(experiment("static", {"dp_replicate": 2}, **changes))
    assert run.summary()["effective"]["sparsity"] == pytest.approx(0.8, abs=0.002)


class Alone:
    """A model on one rank, as entries see it."""

    sharded = ()

    def __init__(self, module: torch.nn.Module) -> None:
        from labkit.experiment import Layout
        from labkit.parallel.mesh import Mesh

        self.stages, self.shard_specs = {0: module}, {}
        self.mesh = Mesh(Layout(), 0, "cpu", connect=False)


def test_without_the_mask_on_gradients_the_count_of_zeros_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros_after_a_step() -> int:
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        masks = Masks(OptimizerShards(Alone(layer), ["weight"]), optimizer)
        masks.set({"weight": torch.eye(8, dtype=torch.bool)})
        layer(torch.randn(4, 8)).square().sum().backward()
        masks.mask_gradients()
        optimizer.step()
        return masks.zeros()["weight"][0]

    assert zeros_after_a_step() == 56
    monkeypatch.setattr(Masks, "mask_gradients", lambda self: None)
    assert zeros_after_a_step() == 0


def test_what_grows_has_no_moments() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    masks = Masks(OptimizerShards(Alone(layer), ["weight"]), optimizer)
    layer(torch.randn(4, 4)).square().sum().backward()
    optimizer.step()
    before = torch.ones(4, 4, dtype=torch.bool)
    before[0] = False
    masks.set({"weight": before})
    after = before.clone()
    after[0, 0], after[1, 1] = True, False
    churn = masks.set({"weight": after})
    moments = [value for value in optimizer.state[layer.weight].values() if value.dim()]
    assert len(moments) == 2
    for value in (layer.weight.detach(), *moments):
        assert torch.equal(value != 0, before & after)
    assert churn["weight"] == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    ("method", "changes", "field"),
    [
        ("rigl", {"sparsity__target": 0.0}, "sparsity.target"),
        ("rigl", {"layout": {"dp_replicate": 2}, "gradients__update": {"method": "local_sgd"}}, "sparsity.method"),
        (
            "static",
            {"layout": {"dp_replicate": 2}, "gradients__update": {"method": "gossip"}},
            "gradients.update.method",
        ),
        ("n_m", {"sparsity__target": 0.9}, "sparsity.target"),
        ("n_m", {"layout": {"dp_shard": 2}}, "layout.zero_stage"),
        ("n_m", {"layout": {"tp": 2}}, "layout.tp"),
        ("structured", {"workload": {"name": "vision"}}, "workload.model"),
    ],
)
def test_what_cannot_work_is_refused(method: str, changes: dict[str, Any], field: str) -> None:
    assert field in [problem.field for problem in experiment(method, **changes).problems()]


def test_the_file_of_events_is_not_believed(tmp_path: Path) -> None:
    from labkit.runs.data import RunData
    from labkit.runs.events import HANDLERS

    data = RunData.__new__(RunData)
    data.sparsity = []
    for layers in (
        ["x"],
        {"a": [1, 0, 0.5]},
        {"a": [5, 4, 0.5]},
        {"a": ["1", 4, 0.5]},
        {"a": [1, 4, float("nan")]},
        {},
    ):
        assert not HANDLERS["sparsity"](data, 0, {"step": 1, "layers": layers})
    assert not HANDLERS["sparsity"](data, 1, {"step": 1, "layers": {"a": [1, 4, 0.5]}})
    assert HANDLERS["sparsity"](data, 0, {"step": 1, "layers": {"a": [1, 4, 0.5]}})
    assert data.sparsity == [(1, {"a": (1, 4, 0.5)})]


def test_weights_grow_where_their_gradient_is_largest() -> None:
    """Not where the mask has just made gradients zero."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 6, bias=False)
    masks = Masks(OptimizerShards(Alone(layer), ["weight"]), torch.optim.SGD(layer.parameters(), lr=0.1))
    masks.set({"weight": torch.eye(6, dtype=torch.bool)})
    layer(torch.randn(4, 6)).square().sum().backward()
    gradients = masks.gradients()["weight"]
    masks.mask_gradients()
    assert (gradients != 0).all()
    assert (layer.weight.grad != 0).sum() == 6
