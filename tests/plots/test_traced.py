"""The pictures of a traced update: what they say, and that nothing in a run directory can spoil them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from labkit.experiment import Experiment
from labkit.experiment.recipes import recipe
from labkit.experiment.run_directory import write_json
from labkit.plots import (
    Picture,
    plot_communication,
    plot_experts,
    plot_memory,
    plot_schedules,
    plot_timeline,
    rows_of,
    static,
    traced,
)
from labkit.plots.closeup import detail_figures
from labkit.plots.report import report
from tests.plots.fake_run import FakeRun

EVIL = "<img src=x onerror=alert(1)>"
MB = 2**20


def run(root: Path, name: str, layout: dict[str, Any], state: tuple[int, int, int] = (4, 4, 8), **more: Any) -> FakeRun:
    """A finished run with a traced update on every rank."""
    experiment = recipe("language-ddp").set({"training.steps": 20, "layout": layout})
    ranks = experiment.layout.world_size
    one = FakeRun(root, name, Experiment(), ranks=1)
    one.experiment, one.ranks = experiment, ranks
    write_json(one.directory.experiment, experiment.to_dict())
    one.set(world_size=ranks, layout=str(experiment.layout))
    for rank in range(1, ranks):
        one.event(rank, "start", device="cpu", pid=1, threads=1, parameters=1000, first=0)
    kinds = dict(zip(("parameters", "gradients", "optimizer"), [size * MB for size in state], strict=True))
    for rank in range(ranks):
        memory = kinds | {"activations": (10 + rank) * MB}
        traffic = {"tp": {"calls": 3, "bytes": 5 * MB, "wire_bytes": 5 * MB, "exposed_seconds": 0.02}}
        extra = {"traffic": traffic} if ranks > 1 else {}
        one.event(rank, "trace", step=4, memory=memory, formula=kinds, **(extra | more.get(f"rank{rank}", {})))
    one.advance(20, evaluate=False)
    return one.end("finished")


def pipeline(stages: int = 1, f: float = 0.01, b: float = 0.02) -> dict[str, dict[str, Any]]:
    """GPipe on two ranks with two microbatches, messages free."""
    first = [["F", 0, 0, 0, f], ["F", 0, 1, f, 2 * f], ["B", 0, 0, 2 * f + 2 * b, 2 * f + 3 * b]]
    first.append(["B", 0, 1, 2 * f + 3 * b, 2 * f + 4 * b])
    second = [["F", 1, 0, f, 2 * f], ["F", 1, 1, 2 * f, 3 * f]]
    second += [["B", 1, 0, 3 * f, 3 * f + b], ["B", 1, 1, 3 * f + b, 3 * f + 2 * b]]
    return {"rank0": {"timeline": first}, "rank1": {"timeline": second}}


PIPE = {"pp": 2, "microbatches": 2, "schedule": "gpipe"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FakeRun]:
    root = tmp_path_factory.mktemp("traced")
    load = {"experts": {"layer_0": [30, 10, 0, 0], "layer_1": [10, 10, 10, 10]}}
    return {
        "one": run(root, "one", {}),
        "shard": run(root, "shard", {"dp_shard": 2, "zero_stage": 2}, (4, 2, 4)),
        "pipe": run(root, "pipe", PIPE, **pipeline()),
        "slow": run(root, "slow", PIPE, **pipeline(f=0.02)),
        "experts": run(root, "experts", {"ep": 2}, rank0=load, rank1=load),
    }


def figures(runs: dict[str, FakeRun]) -> list[Picture]:
    return [
        plot_memory([runs["one"], runs["shard"]]),
        plot_timeline(runs["pipe"]),
        plot_schedules([runs["pipe"], runs["slow"]]),
        plot_experts(runs["experts"]),
        plot_communication([runs["shard"], runs["pipe"]]),
    ]


def test_every_picture_has_a_finding_units_and_a_table(runs: dict[str, FakeRun]) -> None:
    for figure in figures(runs):
        assert any(char.isdigit() for char in figure.layout.title.text)
        assert figure.summary.endswith(".")
        assert figure.rows
        assert all(set(row) == set(figure.rows[0]) for row in figure.rows)
        assert len(json.dumps(static.bundle(figure))) < 60_000
        layout = figure.to_dict()["layout"]
        numbers = [axis for key, axis in layout.items() if key.startswith("xaxis") and axis.get("type") != "category"]
        assert any(axis["title"]["text"] for axis in numbers) or figure.data[0].type == "heatmap"


def test_memory_names_the_fall_and_the_formula(runs: dict[str, FakeRun]) -> None:
    figure = plot_memory([runs["one"], runs["shard"]])
    assert figure.summary == (
        "Model state per rank falls from 16.0 MB (1 rank) to 10.0 MB (shard2, ZeRO 2); within 0.1 % of the formula."
    )
    assert [row["Rank"] for row in figure.rows] == [0, 1], "the fullest"
    bars = {trace.name: list(trace.x) for trace in figure.data if trace.legendgroup != "formula"}
    assert bars["Gradients"] == [4, 2]
    assert bars["Activations (peak)"] == [10, 11]
    assert len({trace.marker.pattern.shape for trace in figure.data[:4]}) == 4, "not by colour alone"


def test_a_pattern_has_its_colour_behind_it_without_any_template(runs: dict[str, FakeRun]) -> None:
    for figure in figures(runs):
        for trace in static.bundle(figure)[static.PLOTLY_MIME]["data"]:
            if (pattern := trace.get("marker", {}).get("pattern", {})).get("shape"):
                assert (pattern["fillmode"], pattern["bgcolor"]) == ("overlay", trace["marker"]["color"])


def test_the_timeline_names_its_bubbles(runs: dict[str, FakeRun]) -> None:
    figure = plot_timeline(runs["pipe"])
    # Busy: two ranks × 2 (F + B) of (3 F + 3 B) in the schedule; the recorded backward passes came 10 ms late.
    assert "the schedule's own bubble is 33 %, 33 % with even stages (textbook)" in figure.summary
    measured = 1 - 2 * 2 * 0.03 / (2 * (2 * 0.01 + 4 * 0.02))
    assert f"were idle for {100 * measured:.0f} %" in figure.summary
    forward, backward = figure.data[0], figure.data[1]
    assert list(forward.y) == ["rank 0"] * 2 + ["rank 1"] * 2
    assert list(forward.text) == ["0", "1", "0", "1"]
    assert forward.marker.color != backward.marker.color
    assert forward.marker.pattern.shape != backward.marker.pattern.shape
    assert sum(len(trace.x) for trace in figure.data) == 2 * 8, "measured and ideal"


def test_schedules_tell_which_is_fastest_and_what_it_keeps(runs: dict[str, FakeRun]) -> None:
    rows = rows_of(plot_schedules([runs["pipe"], runs["slow"], runs["one"]]))
    assert len(rows) == 2, "one rank has no schedule"
    assert rows[0]["The schedule's own"] == "33 %"
    assert rows[0]["Activations"] == "11.0 MB"


def test_experts_are_added_up_over_the_ranks(runs: dict[str, FakeRun]) -> None:
    figure = plot_experts(runs["experts"])
    assert figure.summary == "Expert 0 of layer_0 takes 75 % of the choices, 3.0 times an even share (25 %)."
    assert figure.rows[1] == {"Block": "layer_1"} | {f"expert {n}": "25.0 %" for n in range(4)}


def test_traffic_is_the_largest_over_the_ranks(runs: dict[str, FakeRun]) -> None:
    figure = plot_communication(runs["shard"])
    assert figure.summary == "tp carries most (5.00 MB per rank and step) and has the longest exposed time (20.0 ms)."
    assert figure.rows[0]["Calls"] == "3"


def test_what_was_not_traced_says_so(tmp_path: Path) -> None:
    bare = FakeRun(tmp_path, "bare").train(40)
    for plot in (plot_memory, plot_timeline, plot_schedules, plot_experts, plot_communication):
        figure = plot(bare)
        assert figure.summary.startswith("No ")
        assert not figure.rows
    assert detail_figures([bare]) == []


def test_close_ups_are_those_that_a_run_has(runs: dict[str, FakeRun]) -> None:
    def kinds(*names: str) -> list[str]:
        return [figure.layout.title.text.split()[0] for figure in detail_figures([runs[name] for name in names])]

    assert kinds("one") == ["1"], "memory alone"
    assert len(kinds("shard")) == 2
    assert len(kinds("pipe")) == 3
    assert len(kinds("pipe", "slow")) == 5, "memory, traffic, schedules, two timelines"
    assert len(kinds("experts")) == 3


def test_the_report_and_the_static_lab_hold_them(
    runs: dict[str, FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = report([runs["one"], runs["pipe"]], tmp_path / "report.html").read_text()
    assert "One step in detail" in page
    assert page.count("own bubble") >= 2, "the sentence of the figure and of its table"
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("IPython.core.getipython.get_ipython", object)
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    static.accordion("Closer", detail_figures([runs["pipe"]]))
    static.accordion("Nothing", [])
    [data] = shown
    assert data["text/html"].count("<details") == 4, "a fold, and in it three figures' tables"
    assert "own bubble" in data["text/plain"]


def test_names_tell_apart_and_nothing_more(runs: dict[str, FakeRun]) -> None:
    from labkit.plots.shown import labeled_runs

    assert traced.run_names(labeled_runs([runs["one"], runs["shard"]])) == ["1 rank", "shard2, ZeRO 2"]
    assert traced.run_names(labeled_runs([runs["pipe"], runs["slow"]])) == [
        "pp2, gpipe, 2 microbatches",
        "pp2, gpipe, 2 microbatches #2",
    ]


def test_names_from_a_run_directory_stay_text(tmp_path: Path) -> None:
    bad = {
        "experts": {EVIL: [1, 2], "layer_\u00b2": [1, 2], "layer_10": [1, 2], "layer_9": [1, 2]},
        "traffic": {EVIL: {"calls": 1}},
    }
    odd = run(tmp_path, "odd", {"ep": 2}, rank0=bad)
    odd.directory.experiment.write_text("{}broken")
    odd.set(title=EVIL)
    for figure in detail_figures([odd]):
        page = figure.to_json() + static.details(figure)
        assert "<img" not in page.replace("\\u003c", "<")
    names = [row["Block"] for row in plot_experts(odd).rows]
    assert names.index("layer_9") < names.index("layer_10")


def test_a_damaged_timeline_gives_no_picture(tmp_path: Path) -> None:
    backwards = {"rank0": {"timeline": [["B", 0, 0, 0, 1], ["F", 0, 0, 1, 2]]}}
    odd = run(tmp_path, "odd", PIPE, **backwards, rank1={"timeline": [["B", 1, 0, 0, 1], ["F", 1, 0, 1, 2]]})
    assert plot_timeline(odd).summary.startswith("No timeline")
    assert plot_timeline(run(tmp_path, "half", PIPE, rank0=pipeline()["rank0"])).summary.startswith("No timeline")
