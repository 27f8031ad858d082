"""The GPUs of a run: what is computed of their figures, which warnings follow, and how they are drawn."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from labkit.plots import plot_gpus, theme
from labkit.plots.closeup import gpu_figures
from labkit.plots.report import report
from labkit.runs import RunData
from labkit.runs.follow import summary_text
from labkit.runs.gpu_use import GpuUse, gpu_uses
from labkit.runs.gpu_warnings import gpu_warnings
from labkit.runs.summarize import summarize
from labkit.ui.dashboard import Dashboard
from tests.plots.fake_run import FakeRun
from tests.plots.gpu_record import GIB, record


def trained(root: Path, *changes: dict[str, Any], seconds: int = 20, **options: Any) -> FakeRun:
    """A run of two ranks that trained for 20 s, whose GPUs did what `changes` say."""
    return record(FakeRun(root, "gpus").train(steps=200, step_s=0.1), seconds, *changes, **options)


def uses(run: FakeRun) -> list[GpuUse]:
    data = RunData(run.directory)
    data.refresh()
    return gpu_uses(data)


def test_means_are_of_the_training_and_energy_is_of_the_whole_run(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "late")
    run.clock = 1010.0  # the first step begins ten seconds after the monitor
    record(run.train(steps=200, step_s=0.1), 10, {"utilisation": 0, "power_watts": 100, "energy_joules": 100})
    record(run, 0)
    with open(run.directory.gpus, "a") as file:
        for second in range(11, 31):
            line = {"event": "gpu_use", "gpu": 0, "monotonic": 1000.0 + second, "seconds": 1, "utilisation": 80}
            file.write(json.dumps(line | {"power_watts": 500, "energy_joules": 500}) + "\n")
    (use,) = uses(run)
    assert use.seconds == 30
    assert use.training_seconds == pytest.approx(20, abs=1)
    assert use.utilisation_percent == pytest.approx(80)
    assert use.power_watts == pytest.approx(500)
    assert use.energy_joules == 10 * 100 + 20 * 500
    assert use.energy_watt_hours == pytest.approx(11_000 / 3600)


def test_ranks_share_gpus_in_turn(tmp_path: Path) -> None:
    assert [use.ranks for use in uses(trained(tmp_path / "one", {}))] == [[0, 1]]
    assert [use.ranks for use in uses(trained(tmp_path / "two", {}, {}))] == [[0], [1]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, ""),
        (
            {"throttled": {"thermal": 0.5}, "sm_clock_mhz": 1200, "temperature_celsius": 91},
            "GPU 0: clocks were reduced for 10 s (50 % of the training) because it was too hot, up to 91 °C; "
            "the SM clock was then 1200 of 1980 MHz on average",
        ),
        ({"throttled": {"power": 1.0}}, "because it reached its power limit of 700 W, as most GPUs do under full load"),
        ({"throttled": {"power_brake": 1.0}}, "because the server's power brake was on"),
        ({"throttled": {"hardware": 1.0, "power": 0.1}}, "because the hardware slowed it down"),
        ({"throttled": {"thermal": 0.01}}, ""),
        (
            {"other_processes": 3, "other_bytes": 20 * GIB},
            "GPU 0: 3 other processes hold 20.0 GiB on this card, so its speed is not that of the run alone",
        ),
        ({"other_processes": 1, "other_bytes": 2**20}, ""),
        ({"other_processes": None, "other_bytes": None}, ""),
        ({"pcie_width": 4, "pcie_generation": 3}, "under load its PCIe link has 4 of 16 lanes and generation 3 of 5"),
        ({"pcie_width": 4, "utilisation": 35}, ""),
        ({"memory_bytes": 77 * GIB}, "GPU 0: 77.0 of 80.0 GiB were in use (96 %)"),
        ({"memory_bytes": 75 * GIB}, ""),
        ({"utilisation": 12}, "GPU 0: mostly idle: a kernel was running for 12 % of the training"),
        ({"utilisation": None, "power_watts": None, "energy_joules": None, "throttled": None}, ""),
    ],
)
def test_each_warning_appears_when_it_is_true(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    warnings = gpu_warnings(uses(trained(tmp_path, change)))
    assert len(warnings) == bool(sentence)
    assert all(sentence in warning for warning in warnings)


def test_a_warning_about_several_gpus_appears_once(tmp_path: Path) -> None:
    (warning,) = gpu_warnings(uses(trained(tmp_path, {"memory_bytes": 79 * GIB}, {}, {"memory_bytes": 79 * GIB})))
    assert warning.startswith("GPU 0, GPU 2: 79.0 of 80.0 GiB")


def test_a_short_run_is_not_called_idle(tmp_path: Path) -> None:
    assert gpu_warnings(uses(trained(tmp_path, {"utilisation": 1, "throttled": {"thermal": 1.0}}, seconds=5))) == []


def test_the_figure_shows_every_gpu_in_four_panels(tmp_path: Path) -> None:
    figure = plot_gpus(trained(tmp_path, {}, {"utilisation": 50, "memory_bytes": 79 * GIB}))
    assert figure.layout.title.text == "The 2 GPUs were busy for 70 % of the training and took 4.44 Wh"
    lines = [trace for trace in figure.data if trace.name]
    assert [(line.name, line.yaxis) for line in lines[:4]] == [("GPU 0", axis) for axis in ("y", "y2", "y3", "y4")]
    assert lines[0].line.dash != lines[4].line.dash
    assert set(lines[0].y) == {90}
    assert max(lines[7].y) == 79
    assert {trace.y[0] for trace in figure.data if trace.line.dash == "dot" and trace.showlegend is False} >= {700, 80}
    assert "GPU 1: 79.0 of 80.0 GiB" in figure.summary
    first, second = figure.rows
    assert first["Memory (GiB)"] == "60.0 of 80.0"
    assert (first["Ranks"], second["Ranks"]) == ("0", "1")
    titles = [figure.layout[name].title.text for name in ("yaxis", "yaxis2", "yaxis3", "yaxis4", "xaxis4")]
    assert all("(" in title for title in titles)


def test_a_run_without_figures_says_why(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "none").train(steps=20)
    assert plot_gpus(run).summary.startswith("No GPUs to show")
    assert gpu_figures([run]) == []
    line = {"event": "gpus_unknown", "monotonic": 1.0, "reason": "no figures of the GPUs: the driver <b>"}
    run.directory.gpus.write_text(json.dumps(line) + "\n")
    assert plot_gpus(run).summary == "no figures of the GPUs: the driver <b>."
    assert "no figures of the GPUs: the driver <b>" in summarize(run.directory).notes
    assert "the driver <b>" not in report([run.directory]).read_text()


def test_a_long_run_draws_few_points_and_odd_figures_draw(tmp_path: Path) -> None:
    run = trained(tmp_path, {"utilisation": None, "power_watts": None, "slice": 1}, seconds=3000)
    figure = plot_gpus(run)
    assert max(len(trace.x) for trace in figure.data) <= 2000
    assert figure.rows[0]["Utilisation (%)"] == "–"
    assert "MIG slice 0" in figure.rows[0]["GPU"]


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "garbage", "hole", "too many"])
def test_a_file_made_to_harm_its_reader(kind: str, tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "hostile").train(steps=20)
    path = run.directory.gpus
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "hole":
        with path.open("wb") as file:
            file.truncate(10 * GIB)
    else:
        lines = ['{"event":"gpu_use","gpu":1e99}', '{"event":["gpu"]}', '{"event":"start","gpu":0}', "[" * 500, "null"]
        lines += [f'{{"event":"gpu","gpu":{number},"memory_bytes":-1,"name":7}}' for number in range(1000)]
        path.write_text("\n".join(lines if kind == "garbage" else lines[-1000:]) + "\n")
    data = RunData(run.directory)
    data.refresh(2.0)
    assert len(data.gpus) == (128 if kind in ("garbage", "too many") else 0)
    assert data.steps == 20
    assert len(plot_gpus(data).data) == 0
    assert len(gpu_uses(data)) == len(data.gpus)


EVIL = "<img src=x onerror=alert(1)>"


def test_the_dashboard_the_report_and_the_terminal_have_a_row_per_gpu(tmp_path: Path) -> None:
    run = trained(tmp_path, {"other_processes": 1, "other_bytes": GIB}, {}, name=EVIL)
    page = report([run.directory]).read_text()
    assert "<h3>GPUs</h3>" in page
    assert "What the GPUs did" in page
    assert "<img src" not in page
    assert theme.safe(EVIL) in page
    dashboard = Dashboard()
    dashboard.watch(run)
    dashboard.redraw(force=True)
    dashboard.close()
    assert "GPUs so far" in dashboard.strip.value
    assert "another process holds 1.0 GiB" in dashboard.strip.value
    assert "<img" not in dashboard.strip.value
    text = summary_text(summarize(run.directory).as_dict())
    assert "GPU 1                  90 % busy, 60.0 of 80.0 GiB, 400 W, 2.22 Wh, up to 60 °C" in text
    assert "note                   GPU 0: another process holds 1.0 GiB" in text
