"""Pictures of what is zero: the title states the finding, the table says the same, names stay text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labkit.plots import plot_sparse_layers, plot_sparsity, static
from labkit.plots.closeup import sparsity_figures
from tests.plots.fake_run import EXPERIMENT, FakeRun

Counts = dict[str, list[float]]


def sparse_run(root: Path, name: str, changes: list[tuple[int, Counts]]) -> FakeRun:
    run = FakeRun(root, str(abs(hash(name))), EXPERIMENT.set({"name": name}))
    run.train(30)
    for step, layers in changes:
        run.event(0, "sparsity", step=step, layers=layers)
    return run


@pytest.fixture
def growing(tmp_path: Path) -> FakeRun:
    return sparse_run(
        tmp_path,
        "growing",
        [
            (0, {"a.weight": [0, 100, 0.0], "b.weight": [0, 300, 0.0]}),
            (10, {"a.weight": [50, 100, 0.0], "b.weight": [270, 300, 0.5]}),
            (30, {"a.weight": [50, 100, 0.0], "b.weight": [270, 300, 0.0]}),
        ],
    )


def test_zeros_over_time_and_what_is_new(growing: FakeRun, tmp_path: Path) -> None:
    figure = plot_sparsity(growing)
    assert figure.layout.title.text == "Growing ends with 80 % of its weights at zero"
    [row] = figure.rows
    assert (row["Weights that may be zero"], row["Zero at the end"]) == ("400", "80.0 %")
    assert (row["Changes"], row["New in a change, at most"]) == ("1", "18.8 %")  # 15 of 80 kept
    other = sparse_run(tmp_path, "<b>&", [(0, {"a.weight": [90, 100, 0.0]})])
    both = plot_sparsity([growing, other])
    assert "the most of 2 runs" in both.summary
    assert "<b>" not in json.dumps(static.bundle(both)["application/vnd.plotly.v1+json"])


def test_runs_that_end_alike_are_named_together(growing: FakeRun, tmp_path: Path) -> None:
    other = sparse_run(tmp_path, "other", [(0, {"a.weight": [80, 100, 0.0]})])
    assert plot_sparsity([growing, other]).summary == "All 2 runs end with 80 % of their weights at zero."


def test_layer_by_layer(growing: FakeRun) -> None:
    figure = plot_sparse_layers(growing)
    assert figure.summary == "b.weight ends sparsest, with 90 % zeros; a.weight keeps most, with 50 %."
    assert [row["Zero"] for row in figure.rows] == ["50.0 %", "90.0 %"]
    assert figure.data[0].z.shape == (2, 3)


def test_runs_without_zeros_have_no_such_picture(growing: FakeRun, tmp_path: Path) -> None:
    dense = FakeRun(tmp_path, "dense")
    dense.train(5)
    assert sparsity_figures([dense]) == []
    assert len(sparsity_figures([dense, growing])) == 2
    assert plot_sparsity([dense]).summary.startswith("No sparsity to show")
    assert plot_sparse_layers(dense).summary.startswith("No layers to show")
