"""Every figure states its finding, carries units, a summary and a table; names in it stay text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.experiment import Experiment, Layout
from labkit.experiment.recipes import recipe
from labkit.plots import (
    Picture,
    plot_grid,
    plot_loss,
    plot_metric,
    plot_overview,
    plot_ranks,
    plot_speedup,
    plot_throughput,
    rows_of,
    static,
    summary_of,
    theme,
)
from labkit.plots.grid import grid_html, share
from labkit.plots.overview import SLOTS
from labkit.plots.table import html_table
from labkit.runs.compare import compare
from labkit.runs.data import RunData
from tests.plots.fake_run import FakeRun

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[FakeRun]:
    root = tmp_path_factory.mktemp("runs")
    one = FakeRun(root, "one", ranks=1).train(step_s=0.04)
    two = FakeRun(root, "two").train(step_s=0.0218)
    apart = two.experiment.replace("launch.isolated=true")
    ceiling = FakeRun(root, "ceiling", experiment=apart).train(step_s=0.0205)
    return [one, two, ceiling]


def read(run: FakeRun) -> RunData:
    data = RunData(run.directory)
    data.refresh()
    return data


FIGURES: dict[str, Callable[[list[FakeRun]], Picture]] = {
    "loss": lambda runs: plot_loss(runs[:2]),
    "metric": lambda runs: plot_metric(runs[:2]),
    "throughput": lambda runs: plot_throughput(runs),
    "speedup": lambda runs: plot_speedup(compare([run.directory for run in runs])),
    "ranks": lambda runs: plot_ranks(read(runs[1])),
    "overview": lambda runs: plot_overview(runs, compare([run.directory for run in runs])),
    "grid": lambda runs: plot_grid(Layout(dp_replicate=4), 128),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_finding_a_summary_and_a_table(name: str, runs: list[FakeRun]) -> None:
    figure = FIGURES[name](runs)
    titles = [figure.layout.title.text] if name != "overview" else [note.text for note in figure.layout.annotations]
    assert all(any(char.isdigit() for char in title) for title in titles), titles
    assert summary_of(figure).endswith(".")
    rows = rows_of(figure)
    assert rows
    assert all(set(row) == set(rows[0]) for row in rows)


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "grid"])
def test_every_axis_of_numbers_has_a_title_with_its_unit(name: str, runs: list[FakeRun]) -> None:
    layout = FIGURES[name](runs).to_dict()["layout"]
    for key, axis in layout.items():
        if key.startswith(("xaxis", "yaxis")) and axis.get("type") != "category":
            assert axis["title"]["text"], key


def test_the_speedup_title_says_what_was_found(runs: list[FakeRun]) -> None:
    comparison = compare([run.directory for run in runs])
    row = comparison.rows[1]
    figure = plot_speedup(comparison)
    expected = f"2 ranks train {row['speedup']:.2f} times faster than 1 (ceiling {row['ceiling']:.2f})"
    assert figure.layout.title.text == expected
    assert comparison.baseline_run_id in figure.summary
    bars, ideal, ceiling = figure.data
    assert list(bars.x) == ["1 rank", "2 ranks"]
    assert list(ideal.y) == [1, 2]
    assert list(ceiling.y) == [row["ceiling"]]
    assert bars.error_y.array[1] == pytest.approx(row["speedup_high"] - row["speedup"])


def row(**changes: Any) -> dict[str, Any]:
    base = {"run_id": "r", "workload": "vision", "layout": "dp2", "world_size": 2, "state": "finished", "speedup": 1.5}
    base |= {"speedup_low": 1.4, "speedup_high": 1.6, "ceiling": None, "is_baseline": False, "is_ceiling": False}
    return base | {"notes": []} | changes


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        ([], "No speed-up yet: run the baseline, one rank"),
        ([row(speedup=None, notes=["not enough steps"])], "No speed-up yet: not enough steps"),
        ([row(is_baseline=True, world_size=1)], "No speed-up yet: run it on several ranks"),
        ([row(speedup=0.5, speedup_low=0.4, speedup_high=0.6)], "2 ranks train 2.00 times slower than 1"),
        (
            [row(speedup=0.95, speedup_low=0.8, speedup_high=1.1)],
            "2 ranks train about as fast as 1 (0.80 to 1.10 times)",
        ),
        ([row(), row(world_size=4, speedup=2.9, layout="dp4")], "4 ranks train 2.90 times faster than 1"),
        ([row(speedup_low=None, speedup_high=None, live=True)], "2 ranks train 1.50 times faster than 1 so far"),
        ([row(), row(speedup=3.0, state="failed")], "2 ranks train 1.50 times faster than 1"),
    ],
)
def test_findings_claim_no_more_than_was_measured(rows: list[dict[str, Any]], finding: str) -> None:
    assert plot_speedup(rows).summary == f"{finding}."


def test_a_diverged_run_says_so(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "nan", ranks=1)
    run.event(0, "steps", first=0, loss=[1.0, 2.0, float("nan")], samples=[4] * 3, seconds=[0.1] * 3)
    assert plot_loss(run).summary == "The loss became NaN or infinite at step 3."


@pytest.mark.parametrize("name", ["loss", "metric", "throughput", "overview"])
def test_a_run_without_a_step_draws(name: str, tmp_path: Path) -> None:
    figure = FIGURES[name]([FakeRun(tmp_path, "a"), FakeRun(tmp_path, "b"), FakeRun(tmp_path, "c")])
    assert "yet" in figure.summary


def test_lines_differ_in_more_than_colour(runs: list[FakeRun]) -> None:
    lines = list(plot_metric(runs[:2]).data)
    assert len({trace.line.dash for trace in lines}) == len({trace.marker.symbol for trace in lines}) == 2


def test_overview_has_fixed_places(runs: list[FakeRun]) -> None:
    empty, full = plot_overview([]), plot_overview(runs, compare([run.directory for run in runs]))
    assert len(empty.data) == len(full.data) == 4 * SLOTS + 3
    assert [trace.type for trace in empty.data] == [trace.type for trace in full.data]
    loss_lines = full.data[8:10]  # the third run is the ceiling: copies that do not train together have no loss
    assert [len(trace.x) for trace in loss_lines] == [0, 0]


def test_a_name_full_of_markup_is_text_in_every_figure(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "evil", ranks=1)
    run.set(title=EVIL)
    run.train(40)
    figures = [plot_loss(run), plot_metric(run), plot_throughput(run), plot_overview(run, compare([run.directory]))]
    for figure in figures:
        assert "<img" not in figure.to_json().replace("\\u003c", "<")
        assert "&lt;img" in figure.to_json()
        assert "<img" not in static.details(figure)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a<b>c</b>", "a&lt;b&gt;c&lt;/b&gt;"),
        ("$x^2$", "&#36;x^2&#36;"),
        ("a\nb\u202e\x00c", "a bc"),
        ("&lt;", "&amp;lt;"),
        ("x" * 100, "x" * 59 + "…"),
    ],
)
def test_text_is_made_safe_for_plotly(text: str, expected: str) -> None:
    assert theme.safe(text) == expected


def test_tables_escape_every_cell() -> None:
    drawn = html_table([{EVIL: EVIL}], caption=EVIL)
    assert "<img" not in drawn
    assert drawn.count("&lt;img") == 3


@pytest.mark.parametrize("name", FIGURES)
def test_the_record_is_small_and_has_no_share_button(name: str, runs: list[FakeRun]) -> None:
    bundle = static.bundle(FIGURES[name](runs))
    assert set(bundle) == {static.PLOTLY_MIME, "text/html", "text/plain"}
    assert bundle[static.PLOTLY_MIME]["config"]["showSendToCloud"] is False
    assert bundle["text/plain"].endswith(".")
    assert len(json.dumps(bundle)) < 100_000


def test_the_record_of_a_long_run_stays_small(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "long", ranks=1)
    for _ in range(20):
        run.advance(1000)
    figure = plot_overview(run.end("finished"))
    assert max(len(trace.x) for trace in figure.data) <= 2000
    assert len(json.dumps(static.bundle(figure))) < 300_000


def test_shares_add_up_to_the_batch() -> None:
    for batch, parts in ((128, 3), (7, 4), (64, 1)):
        counts = [int(share(batch, parts, index).split()[0]) for index in range(parts)]
        assert sum(counts) == batch
        assert max(counts) - min(counts) <= 1


def test_the_grid_names_every_axis() -> None:
    figure = plot_grid(Layout(dp_replicate=2, tp=2, pp=2))
    assert len(figure.rows) == 8
    assert {"replica", "tensor", "stage"} <= {word for row in figure.rows for word in row["Holds"].split()}
    assert grid_html(Layout(dp_replicate=100)).count("<b>rank") == 64


def test_the_grid_tells_what_every_rank_holds() -> None:
    def held(layout: dict[str, Any], experiment: Experiment | None = None) -> list[str]:
        return [row["Holds"] for row in plot_grid(Layout(**layout), experiment=experiment).rows]

    assert held({"dp_shard": 2, "zero_stage": 1})[1] == "shard 1 of 2 of the optimizer state"
    assert held({"dp_shard": 2, "zero_stage": 2})[1] == "shard 1 of 2 of gradients and optimizer state"
    assert held({"dp_shard": 2})[0] == "shard 0 of 2 of all model state"
    assert held({"pp": 2}) == ["stage 0 of 2", "stage 1 of 2"]
    assert held({"pp": 2, "stages_per_rank": 2, "schedule": "interleaved_1f1b"})[1] == "stages 1 and 3 of 4"
    assert held({"pp": 2, "stages_per_rank": 2, "schedule": "zbv"}) == ["stages 0 and 3 of 4", "stages 1 and 2 of 4"]
    assert held({"cp": 2}) == ["sequence chunks 0 and 3 of 4", "sequence chunks 1 and 2 of 4"]
    assert held({"tp": 2})[1] == "tensor part 1 of 2"
    experts = recipe("language-ddp").replace("workload.experts=8")
    assert held({"ep": 2}, experts) == ["experts 0–3 of 8", "experts 4–7 of 8"]
    assert held({"ep": 2}) == ["expert group 0", "expert group 1"]


def test_a_straggler_and_a_failed_rank_are_named(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "slow", ranks=3)
    for rank in range(3):
        run.event(rank, "steps", first=0, loss=[1.0] * 9, samples=[1] * 9, seconds=[0.1 if rank < 2 else 0.3] * 9)
    assert plot_ranks(read(run)).summary.startswith("Rank 2 is the slowest: 300 ms")
    run.event(1, "error", type="ValueError", message="m", traceback="t")
    run.end("failed")
    figure = plot_ranks(read(run))
    assert figure.summary == "Rank 1 failed."
    assert [line["State"] for line in figure.rows] == ["ended", "failed", "ended"]


def test_the_one_that_computes_longest_is_named_though_all_wait(tmp_path: Path) -> None:
    fake = FakeRun(tmp_path, "slow", ranks=2).advance(20)
    for rank, busy in ((0, 0.01), (1, 0.04)):
        steps = {"loss": [1.0] * 60, "samples": [1] * 60, "seconds": [0.05] * 60}
        fake.event(rank, "steps", first=20, compute=[busy] * 60, **steps)
    picture = plot_ranks(read(fake))
    said = "Rank 1 is the straggler: it computes 4.0 times as long as the others (median)"
    assert picture.summary == f"{said}."
    assert [row["Computing (ms)"] for row in picture.rows] == ["10.00", "40.0"]


def test_untrusted_progress_does_not_break_the_strip(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "odd")
    for content in (
        {"ranks": "x"},
        {"ranks": [None, {"rank": "1"}, {"rank": 0, "silent_s": "long", "phase": EVIL}]},
        [],
    ):
        run.directory.progress.write_text(json.dumps(content))
        assert len(plot_ranks(read(run)).rows) == 2


def test_numbers_for_people() -> None:
    cases = {1.834: "1.83", 5400.4: "5,400", 0.00321: "0.00321", 0: "0", 12.34: "12.3", 1e-9: "1.00e-09", 1e20: "1e+20"}
    assert {value: theme.number(value) for value in cases} == cases
    assert theme.number(None) == theme.number(float("nan")) == "–"


def test_data_that_grows_keeps_the_first_and_last_step(runs: list[FakeRun]) -> None:
    trace = plot_loss(runs[1]).data[1]
    assert (trace.x[0], trace.x[-1]) == (1, 200)
    assert np.isfinite(trace.y).all()
