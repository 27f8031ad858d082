"""Pictures of numbers and of three numbers: titles state what the table says, names stay text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.plots import plot_layer_numbers, plot_numbers, plot_three_numbers, report, static
from labkit.plots.closeup import precision_figures
from tests.plots.fake_run import EXPERIMENT, FakeRun

BINS = 255


def side(kind: str, codes: list[float] | None = None, zeros: float = 0.0, **more: Any) -> dict[str, Any]:
    """With its numbers at these places (of the largest), evenly; a bell where none are given."""
    places = np.linspace(-1, 1, BINS)
    counts = np.zeros(BINS, int)
    if codes is None:
        counts = (1000 * np.exp(-8 * places**2)).astype(int)
    for code in codes or []:
        counts[round((code + 1) * (BINS // 2))] += 100
    found = {"kind": kind, "factor": kind, "zeros": zeros, "share": "layer", "numbers": 1000}
    return found | {"counts": counts.tolist()} | more


def layer(name: str, inputs: dict[str, Any], weight: dict[str, Any], **more: Any) -> dict[str, Any]:
    found = {"name": f"blocks.{name}", "stage": 0, "shape": [8, 16], "part": "", "stored": "float32"}
    return found | {"answers": "float32", "input": inputs, "weight": weight} | more


def kind(theory_bytes: float, dense_s: float | None = 0.002, own_s: float | None = 0.004) -> dict[str, Any]:
    found = {"layers": ["a"], "count": 1, "shape": [8, 16], "rows": 64, "multiplied": "int8 × int8", "weights": 128}
    return found | {
        "nonzero": 128,
        "bytes": [theory_bytes] * 3,
        "dense_seconds": dense_s,
        "seconds": own_s,
        "measured": 1,
    }


def narrow_run(root: Path, name: str, *changes: str, layers: list[Any], kinds: list[Any], step_s: float) -> FakeRun:
    run = FakeRun(root, name, EXPERIMENT.replace(*changes) if changes else EXPERIMENT)
    run.train(60, step_s)
    words: dict[str, int] = {}
    for one in layers:
        said = f"{one['input']['kind']} × {one['weight']['kind']}"
        words[said] = words.get(said, 0) + 1
    run.event(0, "numbers", layers=layers, multiplied=words)
    if kinds:
        run.event(0, "kernels", kinds=kinds, left_out=1)
    return run


@pytest.fixture
def dense(tmp_path: Path) -> FakeRun:
    layers = [layer("a", side("float32", zeros=0.4), side("float32"))]
    return narrow_run(tmp_path, "dense", layers=layers, kinds=[], step_s=0.02)


@pytest.fixture
def ternary(tmp_path: Path) -> FakeRun:
    layers = [
        layer("first", side("float32"), side("float32")),
        layer("a", side("int8", factor="int8", share="token"), side("ternary", [-1, 0, 1], 1 / 3, factor="int8")),
        layer("b", side("int8", zeros=0.5), side("ternary", [-1, 0, 0, 1], 0.5, factor="int8")),
    ]
    changes = "quantization.training=bitnet"
    return narrow_run(tmp_path, "ternary", changes, layers=layers, kinds=[kind(1)], step_s=0.04)


def test_ternary_weights_are_drawn_as_three_stems(dense: FakeRun, ternary: FakeRun) -> None:
    figure = plot_numbers([dense, ternary])
    assert (
        figure.layout.title.text == "BitNet multiplies int8 × ternary: its weights take 3 values, 42 % of them are zero"
    )
    assert [trace.type for trace in figure.data] == ["scatter", "scatter", "bar", "scatter"]
    assert np.allclose(figure.data[2].x, [-1, 0, 1])
    assert np.allclose(figure.data[2].y, [100 * 7 / 24, 100 * 5 / 12, 100 * 7 / 24])
    rows = {(row["Run"], row["Numbers"]): row for row in figure.rows}
    assert rows["BitNet", "weights"]["Layers"] == "2 of 3 layers"
    assert (rows["BitNet", "weights"]["Values"], rows["BitNet", "weights"]["Zero"]) == ("3", "41.7 %")
    assert rows["dense float32", "inputs"]["Zero"] == "40.0 %"
    linear, log = figure.layout.updatemenus[0].buttons
    assert {value for key, value in log.args[0].items() if key.endswith("type")} == {"log"}
    assert set(linear.args[0]) == set(log.args[0])


def test_one_layer_can_be_chosen(ternary: FakeRun) -> None:
    figure = plot_numbers(ternary, layer="b")
    assert figure.rows[0]["Layers"] == "b"
    assert figure.rows[1]["Zero"] == "50.0 %"
    assert plot_numbers(ternary, layer="nowhere").summary.startswith("No numbers to show")


def test_many_zeros_do_not_hide_the_other_numbers(tmp_path: Path) -> None:
    spread = side("float32", zeros=0.9)
    spread["counts"][BINS // 2] = 9 * sum(spread["counts"])
    changes = ("sparsity.method=static", "sparsity.target=0.9")
    run = narrow_run(tmp_path, "sparse", *changes, layers=[layer("a", side("float32"), spread)], kinds=[], step_s=0.01)
    figure = plot_numbers(run)
    assert figure.layout.yaxis.range[1] < 2 < max(figure.data[0].y)
    assert "zero: 90 % ↑" in [note.text for note in figure.layout.annotations]


def test_layer_by_layer(ternary: FakeRun) -> None:
    figure = plot_layer_numbers(ternary)
    assert figure.summary == "2 of 3 layers multiply int8 × ternary; b gets the most zeros, 50 % of its inputs."
    assert [row["Multiplied"] for row in figure.rows] == ["float32 × float32", "int8 × ternary", "int8 × ternary"]
    assert figure.rows[1]["In memory"] == "int8 × int8"
    words = [note.text for note in figure.layout.annotations]
    assert "float32 → int8 × ternary → float32" in words


def test_of_many_layers_it_says_that_some_are_shown(ternary: FakeRun) -> None:
    ternary.event(1, "numbers", layers=[layer("c", side("int8"), side("ternary"))], multiplied={"int8 × ternary": 5})
    figure = plot_layer_numbers(ternary)
    assert figure.summary.startswith("7 of 8 layers multiply int8 × ternary")
    assert figure.summary.endswith("; shown are 4, evenly spaced.")


def test_three_numbers_beside_the_dense_run(dense: FakeRun, ternary: FakeRun) -> None:
    figure = plot_three_numbers([dense, ternary])
    [row] = figure.rows
    assert (row["Run"], row["Compared with"]) == ("BitNet", "dense")
    assert (row["Theory (times)"], row["Kernels (times)"]) == ("4.00", "0.500")
    assert float(row["Step (times)"]) == pytest.approx(0.5, abs=0.02)
    assert row["Gap"] == "accuracy +0.0 points"
    assert figure.summary.startswith("BitNet promises 4.0×, its kernels give 0.50× and the step 0.5")
    ends = [note.text for note in figure.layout.annotations]
    assert ends[:2] == ["4.0×", "0.50×"]
    assert figure.layout.shapes[0].x0 == 1
    drawn = [trace.base[0] + trace.x[0] for trace in figure.data]
    assert drawn[:2] == [4.0, 0.5]


def test_a_method_gains_only_where_its_interval_says_so(dense: FakeRun, ternary: FakeRun, tmp_path: Path) -> None:
    layers = [layer("a", side("float32"), side("float32"))]
    fast, even = (
        narrow_run(tmp_path, name, change, layers=layers, kinds=[kind(2, own_s=0.001)], step_s=step_s)
        for name, change, step_s in (
            ("fast", "quantization.training=bf16", 0.01),
            ("even", "quantization.training=pure_bf16", 0.02),
        )
    )
    figure = plot_three_numbers([ternary, dense, fast, even])
    assert figure.summary.startswith("1 of 3 methods makes the step faster; bf16 promises 2.0×")
    assert [row["Run"] for row in figure.rows][1:] == ["bf16", "pure_bf16"]


def test_without_a_dense_run_the_step_is_not_compared(ternary: FakeRun, dense: FakeRun) -> None:
    figure = plot_three_numbers(ternary)
    assert "the step was not compared" in figure.summary
    assert "there is no dense float32 run with the same workload, layout and batch for" in figure.summary
    assert figure.rows[0]["Step (times)"] == "–"
    assert plot_three_numbers(dense).summary.startswith("No three numbers to show")


def test_what_was_not_measured_is_said(tmp_path: Path, dense: FakeRun) -> None:
    layers = [layer("a", side("float32"), side("float32"))]
    kinds = [kind(4, None, None)]
    run = narrow_run(tmp_path, "odd", "quantization.qat=int8", layers=layers, kinds=kinds, step_s=0.02)
    figure = plot_three_numbers([dense, run])
    assert figure.rows[0]["Kernels (times)"] == "–"
    assert "not measured" in [note.text for note in figure.layout.annotations]


def test_close_ups_and_report_have_them_where_a_run_is_narrow(dense: FakeRun, ternary: FakeRun, tmp_path: Path) -> None:
    assert precision_figures([dense]) == []
    assert [len(picture.rows) for picture in precision_figures([dense, ternary])] == [1, 4, 3]
    path = report.report([dense, ternary], tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert "In which precision the layers compute" in text
    assert "its kernels give" in text


def test_names_stay_text(tmp_path: Path) -> None:
    layers = [layer("<b>x</b>", side("<i>"), side("float32"), stored="<script>")]
    run = narrow_run(tmp_path, "odd", "name=<b>&", "quantization.qat=int8", layers=layers, kinds=[kind(1)], step_s=0.02)
    for picture in precision_figures([run]):
        drawn = json.dumps(static.bundle(picture)["application/vnd.plotly.v1+json"])
        assert not any(
            tag in drawn.replace("<b>inputs", "").replace("<b>stored", "") for tag in ("<script>", "<i>", "<b>x")
        )
