"""The picture of quantized networks: what it gains and costs in the title, every run in the table, names stay text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labkit.plots import plot_quantized, static
from labkit.plots.closeup import precision_figures
from labkit.plots.report import report
from tests.plots.fake_run import EXPERIMENT, FakeRun

LAYERS = [["blocks.layer_0.mlp.up", 0.001], ["blocks.layer_0.mlp.down", 0.02], ["blocks.head", -0.002]]


def quantized_run(root: Path, method: str, seconds: float, layers: Any = LAYERS, change: float = -0.01) -> FakeRun:
    run = FakeRun(root, str(abs(hash((method, seconds)))), EXPERIMENT)
    run.train(30)
    run.event(
        0,
        "quantized",
        method=method,
        qat="none",
        layers=12,
        samples=100,
        seconds=1.0,
        metrics={"float": {"loss": 0.3, "accuracy": 0.9}, "quantized": {"loss": 0.31, "accuracy": 0.9 + change}},
        bytes={"float": 5000, "quantized": 1500},
        layer_bytes={"float": 4000, "quantized": 1000},
        latency_seconds={
            "1": {"float": 1e-3, "quantized": 2e-3},
            "512": {"float": 0.3, "quantized": seconds},
        },
        sensitivity=layers,
    )
    return run


def test_the_title_says_what_it_gains_what_it_costs_and_who_suffers(tmp_path: Path) -> None:
    figure = plot_quantized(quantized_run(tmp_path, "int8_dynamic", 0.1))
    assert figure.summary == (
        "int8 dynamic: 3.0 times the speed for batches of 512, 4.0 times fewer bytes, accuracy -0.01; "
        "layer_0.mlp.down is the most sensitive layer."
    )
    left, right = figure.data
    assert list(left.x) == ["1", "512"]
    assert list(left.y) == pytest.approx([0.5, 3.0])
    assert list(right.y) == ["layer_0.mlp.up", "layer_0.mlp.down", "head"]
    assert list(right.x) == [0.001, 0.02, -0.002]
    [row] = figure.rows
    assert (row["Speed, batch 1"], row["Speed, batch 512"], row["Change"]) == ("0.50 ×", "3.00 ×", "accuracy -0.0100")


def test_several_conversions_stand_side_by_side(tmp_path: Path) -> None:
    runs = [quantized_run(tmp_path, "int8_dynamic", 0.1), quantized_run(tmp_path, "int8_static", 0.05)]
    figure = plot_quantized(runs)
    assert figure.summary == "int8 static is the fastest of 2: 6.0 times for batches of 512."
    assert [row["Run"] for row in figure.rows] == ["int8 dynamic", "int8 static"]
    assert len(figure.data) == 4


def test_names_of_layers_stay_text_and_holes_stay_holes(tmp_path: Path) -> None:
    run = quantized_run(tmp_path, "<b>method", 0.1, [["<script>alert(1)</script>", 0.5], ["gone", None]])
    figure = plot_quantized(run)
    assert figure.data[1].x[1] is None
    assert "<script>alert" not in static.details(figure)
    page = report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert json.loads(figure.to_json())["data"]


def test_without_a_conversion_there_is_nothing(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "plain", EXPERIMENT)
    run.train(30)
    assert plot_quantized(run).rows == []
    assert precision_figures(run) == []
    assert len(precision_figures(quantized_run(tmp_path, "int8_dynamic", 0.1))) == 1
