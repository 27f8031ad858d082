"""The pictures of how ranks combined what they learned: what they claim, and that they claim no more."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labkit.experiment.run_directory import write_json
from labkit.plots import (
    Picture,
    plot_break_even,
    plot_overview,
    plot_split,
    plot_staleness,
    plot_tradeoff,
    static,
    theme,
    traced,
)
from labkit.plots.break_even import finding as break_even_finding
from labkit.plots.closeup import detail_figures, method_figures
from labkit.plots.report import report
from labkit.plots.shown import labeled_runs
from labkit.plots.tradeoff import VIEWS
from labkit.runs.break_even import BreakEven
from tests.plots.fake_run import EXPERIMENT, FakeRun, combined, drawn

EVIL = "<img src=x onerror=alert(1)>"
MB = 2**20
POWER, LOCAL = "gradients.compression.method=powersgd", "gradients.update.method=local_sgd"
SERVER, GOSSIP = "gradients.update.method=parameter_server", "gradients.update.method=gossip"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FakeRun]:
    root = tmp_path_factory.mktemp("methods")
    return {
        "plain": combined(root, "plain", sent=20 * MB),
        "power": combined(root, "power", POWER, sent=0.2 * MB, compression_s=0.008, pace=0.99),
        "worse": combined(root, "worse", POWER, "gradients.compression.rank=1", sent=0.1 * MB, pace=1.5),
        "local": combined(root, "local", LOCAL, sent=20 * MB, every=8, pace=0.99),
        "native": combined(root, "native", sent=20 * MB, mbit=None),
        "server": drawn(root, "server", SERVER, stale=[0, 1, 1, 2]),
        "gossip": drawn(root, "gossip", GOSSIP, stale=[1, 5]),
    }


def figures(runs: dict[str, FakeRun]) -> list[Picture]:
    every = list(runs.values())
    return [
        *(plot_tradeoff(every, view) for view in VIEWS),
        plot_split(every),
        plot_break_even(every),
        plot_staleness(every),
        *(plot_overview(every, x_axis=x_axis) for x_axis in ("steps", "time", "bytes")),
    ]


def test_every_picture_has_a_finding_units_and_a_table(runs: dict[str, FakeRun]) -> None:
    for figure in figures(runs):
        layout = figure.to_dict()["layout"]
        titles = [layout["title"]["text"]] if "title" in layout else [note["text"] for note in layout["annotations"]]
        assert any(char.isdigit() for title in titles for char in title)
        assert figure.summary.endswith(".")
        assert all(set(row) == set(figure.rows[0]) for row in figure.rows)
        numbers = {key: axis for key, axis in layout.items() if key[1:].startswith("axis")}
        assert all(axis["title"]["text"] for axis in numbers.values() if axis.get("type") != "category")
        assert len(json.dumps(static.bundle(figure))) < 110_000


# -- the trade-off ----------------------------------------------------------------------------------------------------


def test_the_race_to_the_loss_at_which_plain_averaging_ends(runs: dict[str, FakeRun]) -> None:
    figure = plot_tradeoff([runs["plain"], runs["power"]])
    power, plain = (next(row for row in figure.rows if row["Run"] == name) for name in ("PowerSGD", "plain averaging"))
    [target] = [key.split()[4].rstrip(":") for key in power if key.startswith("To a loss")]
    said = re.fullmatch(
        r"PowerSGD reaches a loss of (.*) in (.*) s, plain averaging in (.*) s", figure.layout.title.text
    )
    assert said is not None
    assert said[1] == target
    assert float(said[2]) == pytest.approx(float(power["time (s)"]), rel=0.02)
    assert float(said[3]) == pytest.approx(float(plain["time (s)"]), rel=0.02)
    assert f"target loss {target}, 1.02 times the final loss of plain averaging (mean of 10 steps)" in figure.summary
    assert plot_tradeoff([runs["plain"], runs["power"]], "bytes").summary.startswith(
        f"PowerSGD reaches a loss of {target} with {power['sent']} sent, plain averaging with {plain['sent']} sent"
    )
    assert plot_tradeoff([runs["plain"], runs["worse"]]).summary.startswith("Plain averaging reaches")
    assert "no other run does" in plot_tradeoff([runs["plain"], runs["worse"]]).summary
    assert plot_tradeoff([runs["plain"], runs["power"]], target=0.001).summary.startswith("No run stays at or below")


def test_the_gap_is_that_at_equal_samples(runs: dict[str, FakeRun], tmp_path: Path) -> None:
    half = combined(tmp_path, "half", steps=100)
    gap = plot_tradeoff([half, runs["power"]], "samples")
    assert gap.summary.startswith("After 12,800 samples the loss of PowerSGD is ")
    three = plot_tradeoff([runs[name] for name in ("plain", "power", "worse")], "samples").summary
    assert three.startswith("After 25,600 samples losses differ from plain averaging's by -")
    assert "% (PowerSGD) to +" in three


def test_the_switch_shows_one_view_and_changes_axis_and_title(runs: dict[str, FakeRun]) -> None:
    figure = plot_tradeoff([runs["plain"], runs["power"], runs["local"]], "bytes")
    [menu] = figure.layout.updatemenus
    assert menu.active == VIEWS.index("bytes")
    for at, (view, button) in enumerate(zip(VIEWS, menu.buttons, strict=True)):
        styles, layout = button.args
        shown = [trace for trace, visible in zip(figure.data, styles["visible"], strict=True) if visible]
        assert list(figure.data).index(shown[0]) == 9 * at
        assert len(shown) == 9, "loss, star and metric of three runs"
        assert layout["xaxis.title.text"] == layout["xaxis2.title.text"]
        assert layout["xaxis.type"] == layout["xaxis2.type"]
        assert (
            layout["title.text"] == plot_tradeoff([runs["plain"], runs["power"], runs["local"]], view).layout.title.text
        )
        if view == "bytes":
            assert layout["xaxis.type"] == "log"
            assert [trace.visible for trace in figure.data] == styles["visible"]


def test_lines_end_where_their_run_ended(runs: dict[str, FakeRun]) -> None:
    for view, end in (("samples", 200 * 128), ("bytes", 200 * 2 * 20.0)):
        loss = plot_tradeoff(runs["plain"], view).data[3 * VIEWS.index(view)]
        assert loss.x[-1] == pytest.approx(end)
        assert np.isfinite(loss.y).all()


def test_runs_without_bytes_or_without_a_reference_say_so(runs: dict[str, FakeRun], tmp_path: Path) -> None:
    bare = FakeRun(tmp_path, "bare").train(60)
    figure = plot_tradeoff([bare, runs["power"]], "bytes")
    assert figure.rows[0]["Sent"] == "–"
    assert "there is no loss to reach" in plot_tradeoff([runs["power"]]).summary
    assert plot_tradeoff([]).summary.startswith("No trade-off")
    assert plot_tradeoff(FakeRun(tmp_path, "empty")).summary.startswith("No trade-off")
    with pytest.raises(ValueError, match="samples, time, bytes"):
        plot_tradeoff([bare], "luck")


# -- step, link, staleness --------------------------------------------------------------------------------------------


def test_the_split_names_who_stands_still(runs: dict[str, FakeRun]) -> None:
    figure = plot_split([runs["plain"], runs["worse"], runs["local"]])
    assert figure.summary == "Communication stalls plain averaging for 99 % of a step, PowerSGD rank 1 for 30 %."
    assert [row["Sent per rank"] for row in figure.rows] == ["20.0 MB", "102 kB", "2.50 MB"]
    assert all(row["Sent per rank"] == row["Formula"] for row in figure.rows)
    assert "20.0 MB sent per rank (formula 20.0 MB)" in figure.data[0].customdata
    to_percent = figure.layout.updatemenus[0].buttons[1].args
    assert to_percent[1]["barnorm"] == "percent"
    assert to_percent[0]["visible"] == [True] * 5 + [False], "totals in ms have no place there"


def test_break_even_says_above_which_rate_plain_averaging_is_faster(runs: dict[str, FakeRun]) -> None:
    figure = plot_break_even([runs[name] for name in ("power", "plain", "native", "server")])
    saved, extra = 2 * 19.8 * MB, 0.008
    rate = saved / extra * 8 / 1e9
    assert figure.summary == f"Plain averaging is faster than PowerSGD above {rate:.1f} Gbit/s."
    assert [row["Run"] for row in figure.rows] == ["plain averaging", "PowerSGD"], (
        "what is drawn has no step to wait in"
    )
    assert "no limit" in figure.rows[0]["Measured steps (ms)"]
    assert "200 Mbit/s" in figure.rows[0]["Measured steps (ms)"]
    cross = figure.data[-1]
    assert cross.x[0] == pytest.approx(1000 * rate, rel=1e-3)
    plain, power = figure.data[0], figure.data[2]
    heights = [float(np.interp(np.log(cross.x[0]), np.log(line.x), line.y)) for line in (plain, power)]
    assert heights == pytest.approx([cross.y[0]] * 2, rel=0.01), "both lines go through it"


INF = float("inf")


@pytest.mark.parametrize(
    ("crossings", "said"),
    [
        ([BreakEven(500, 400, 600)], "faster than a above 500 Mbit/s"),
        ([BreakEven(0, 0, 0)], "faster than a at every rate"),
        ([BreakEven(INF, INF, INF)], "faster than a at no rate"),
        ([BreakEven(INF, 2500, INF)], "faster than a above 2.50 Gbit/s at the earliest"),
        ([BreakEven(INF, INF, INF), BreakEven(500, 400, 600)], "faster than b above 500 Mbit/s, than a at no rate"),
        (
            [BreakEven(rate, rate, rate) for rate in (500, 4000, 90, 700)],
            "faster than all 4 methods above 4.00 Gbit/s (b) and slower than all below 90.0 Mbit/s (c)",
        ),
    ],
)
def test_findings_about_the_link(crossings: list[BreakEven], said: str) -> None:
    assert break_even_finding(["a", "b", "c", "d"][: len(crossings)], crossings) == f"plain averaging is {said}"


def test_only_what_differs_in_its_method_is_compared_on_the_link(runs: dict[str, FakeRun], tmp_path: Path) -> None:
    other = combined(tmp_path, "other", POWER, "training.global_batch=64")
    more = combined(tmp_path, "more", POWER, ranks=4)
    same = combined(tmp_path, "same", "gradients.bucket_mb=1")
    for odd in (other, more, same):
        assert plot_break_even([runs["plain"], odd]).summary.startswith("No break-even")
    assert plot_break_even([runs["power"], runs["local"]]).summary.startswith("No break-even")


def test_staleness_is_a_share_of_gradients_by_age(runs: dict[str, FakeRun], tmp_path: Path) -> None:
    figure = plot_staleness([runs["server"], runs["gossip"], runs["plain"]])
    assert figure.summary == "Gradients are 3.0 updates old on average with Gossip, 1.0 with ParameterServer."
    assert list(figure.data[0].y) == [25, 50, 25, 0, 0, 0]
    assert list(figure.data[1].y) == [0, 50, 0, 0, 0, 50]
    assert figure.rows[1]["Median"] in (1, 5)
    assert [row["Oldest"] for row in figure.rows] == [2, 5]
    old = plot_staleness(drawn(tmp_path, "old", GOSSIP, stale=[0, 100], steps=20))
    assert list(old.data[0].x)[-1] == "32 or more"
    assert old.data[0].y[-1] == 50
    assert plot_staleness(runs["plain"]).summary.startswith("No staleness")


# -- names, places, harm ----------------------------------------------------------------------------------------------


def test_names_tell_methods_options_and_links(runs: dict[str, FakeRun]) -> None:
    def names(*chosen: str, links: bool = True) -> list[str]:
        return traced.run_names(labeled_runs([runs[name] for name in chosen]), links)

    assert names("plain", "worse", "local") == ["plain averaging", "PowerSGD rank 1", "LocalSGD"]
    assert names("plain", "native") == ["200 Mbit/s", "dp2"]
    assert names("plain", "native", "power") == [
        "plain averaging, 200 Mbit/s",
        "plain averaging",
        "PowerSGD, 200 Mbit/s",
    ]
    assert names("plain", "power", links=False) == ["plain averaging", "PowerSGD"]
    assert labeled_runs([runs["worse"]])[0].label == "vision dp2, PowerSGD rank 1, 200 Mbit/s (2 ranks)"
    styles = [theme.style(index) for index in range(12)]
    assert len(set(styles)) == 12


def test_the_overview_can_be_drawn_against_time_and_bytes(runs: dict[str, FakeRun], tmp_path: Path) -> None:
    one = FakeRun(tmp_path, "one", ranks=1).train(60)
    plain = [plot_overview([one, runs["plain"]], x_axis=x_axis).data[5] for x_axis in ("steps", "time", "bytes")]
    assert [trace.x[-1] for trace in plain] == pytest.approx([200, 200 * 1.7, 200 * 40], rel=0.05)
    assert plot_overview([one], x_axis="bytes").data[1].x[-1] == 0, "one rank sends nothing"
    with pytest.raises(ValueError, match="steps, time, bytes"):
        plot_overview([one], x_axis="samples")


def test_they_stand_where_a_run_has_such_a_method(runs: dict[str, FakeRun], tmp_path: Path) -> None:
    def first(*chosen: FakeRun) -> list[str]:
        return [figure.layout.title.text.split()[0] for figure in method_figures(list(chosen))]

    usual = FakeRun(tmp_path, "usual").train(60)
    assert method_figures([usual, FakeRun(tmp_path, "one", ranks=1).train(60)]) == []
    assert len(first(runs["plain"], runs["power"])) == 3, "trade-off, split, break-even"
    assert len(first(runs["power"])) == 1, "split"
    assert len(first(runs["plain"], runs["gossip"])) == 3, "trade-off, split, staleness"
    assert detail_figures([runs["plain"], runs["power"]]) == [], "nothing was traced"
    page = report([runs["plain"], runs["power"]], tmp_path / "report.html").read_text()
    assert "How ranks combined gradients or weights" in page
    assert "One step in detail" not in page


def test_a_name_full_of_markup_is_text_in_every_picture(tmp_path: Path) -> None:
    odd = [
        combined(tmp_path, "plain", f"name={EVIL}"),
        combined(tmp_path, "power", POWER, f"name={EVIL}2"),
        drawn(tmp_path, "gossip", GOSSIP, f"name={EVIL}3", stale=[1]),
    ]
    for figure in method_figures(odd):
        assert "<img" not in figure.to_json().replace("\\u003c", "<")
        assert "<img" not in static.details(figure)
        assert "&lt;img" in static.details(figure)


@pytest.mark.parametrize(
    "columns", [{"exposed": "much"}, {"exposed": [1e300] * 20}, {"bytes": [-1] * 20}, {"compression": None}]
)
def test_rubbish_in_the_columns_spoils_no_picture(columns: dict[str, Any], tmp_path: Path) -> None:
    odd = FakeRun(tmp_path, "odd", EXPERIMENT.replace(POWER))
    for _ in range(3):
        odd.advance(20, **{"bytes": 1, "exposed": 0.0, "compression": 0.0} | columns)
    odd.event(0, "communication", bytes_per_step="many", counted_bytes_per_step=-1e400)
    odd.end("finished")
    plain = combined(tmp_path, "plain")
    assert len(method_figures([plain, odd])) >= 2
    write_json(odd.directory.experiment, {"gradients": 3})
    assert method_figures([plain, odd])
