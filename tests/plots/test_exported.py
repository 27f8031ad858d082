"""The picture of exported networks: the title names the best form, the table has all of them, names stay text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labkit.plots import plot_exported, static
from labkit.plots.closeup import sparsity_figures
from labkit.plots.report import report
from tests.plots.fake_run import EXPERIMENT, FakeRun

SLOW = {"1": {"dense": 1e-3}, "32": {"dense": 4e-3}, "512": {"dense": 6e-2}}
FAST = {"1": {"dense": 1e-3}, "32": {"dense": 4e-3, "csr": 3.5e-3}, "512": {"dense": 6e-2, "csr": 2e-2}}


def exported_run(root: Path, name: str, latency: dict[str, Any], sizes: dict[str, float], change: float = 0) -> FakeRun:
    run = FakeRun(root, str(abs(hash(name))), EXPERIMENT.set({"name": name}))
    run.train(30)
    run.event(0, "sparsity", step=30, layers={"a.weight": [90, 100, 0.0]})
    metrics = {form: {"loss": 0.3, "accuracy": 0.9 + change * (form != "dense")} for form in sizes}
    last = latency["512"]
    run.event(
        0,
        "exported",
        samples=100,
        seconds=3.0,
        saved=min(last, key=last.get),
        file_bytes=5,
        metrics=metrics,
        bytes=sizes,
        layers={form: 12 * (form != "dense") for form in sizes},
        csr_layers={"512": 12},
        latency_seconds=latency,
    )
    return run


@pytest.fixture
def fast(tmp_path: Path) -> FakeRun:
    return exported_run(tmp_path, "fast", FAST, {"dense": 12 * 2**20, "csr": 3 * 2**20})


def test_the_title_says_what_the_best_form_gains(fast: FakeRun) -> None:
    figure = plot_exported(fast)
    assert figure.summary == (
        "CSR (non-zero weights only): 3.0 times as fast as dense for batches of 512, 25 % of the bytes, "
        "the accuracy the same."
    )
    [left, right] = figure.data
    assert list(left.x) == ["1", "32", "512"]
    assert [value and round(value, 2) for value in left.y] == [None, 1.14, 3.0]
    assert list(right.y) == [25.0]
    dense, csr = figure.rows
    assert (dense["Form"], dense["Batch 512 (ms)"], dense["In the file"]) == ("dense", "60.0", "")
    assert (csr["Batch 1 (ms)"], csr["Batch 512 (ms)"], csr["In the file"]) == ("–", "20.0 (3.00×)", "yes")
    assert (csr["Bytes"], csr["Layers changed"], csr["Held-out accuracy"]) == ("3.00 MB", 12, "0.90000")


def test_a_gap_of_the_metric_is_told(tmp_path: Path) -> None:
    latency = {"512": {"dense": 2.0, "dense_16": 1.5, "two_four": 1.0}}
    run = exported_run(tmp_path, "half", latency, {"dense": 8, "dense_16": 4, "two_four": 3}, change=-0.0123)
    assert plot_exported(run).summary.endswith("38 % of the bytes, the accuracy -0.0123.")


def test_several_runs_are_told_apart_and_their_names_stay_text(fast: FakeRun, tmp_path: Path) -> None:
    other = exported_run(tmp_path, "<b>&", FAST | {"512": {"dense": 6e-2, "csr": 1e-2}}, {"dense": 8, "csr": 4})
    figure = plot_exported([fast, other])
    assert figure.summary.startswith("<b>&, CSR (non-zero weights only): 6.0 times")
    assert len(figure.data) == 4
    assert len(figure.rows) == 4
    assert "<b>" not in json.dumps(static.bundle(figure)["application/vnd.plotly.v1+json"])


def test_where_nothing_is_gained_it_says_so(fast: FakeRun, tmp_path: Path) -> None:
    slow = exported_run(tmp_path, "slow", SLOW, {"dense": 8})
    figure = plot_exported(slow)
    assert figure.summary == "No form is faster than the dense network for batches of 512."
    assert [row["Form"] for row in figure.rows] == ["dense"]
    dense = FakeRun(tmp_path, "dense")
    dense.train(5)
    assert plot_exported(dense).summary.startswith("No exported network to show")
    assert len(plot_exported([dense, slow, fast]).rows) == 3


def test_numbers_that_are_missing_leave_gaps(tmp_path: Path) -> None:
    """What the reader of events lets through is drawn."""
    run = exported_run(tmp_path, "odd", {"512": {"csr": 1.0}, "1": {"dense": 0.0, "csr": 0.0}}, {})
    figure = plot_exported(run)
    assert figure.summary.startswith("No form is faster")
    assert len(figure.rows) == 2


def test_it_stands_with_the_pictures_of_zeros(fast: FakeRun, tmp_path: Path) -> None:
    found = sparsity_figures([fast])
    assert len(found) == 3
    assert found[-1].summary == plot_exported(fast).summary
    page = report([fast], tmp_path / "report.html").read_text(encoding="utf-8")
    assert found[-1].summary in page
