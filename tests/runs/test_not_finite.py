"""A held-out figure that is no finite number is said as such wherever the figure would stand, and never left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from labkit import cli
from labkit.experiment.run_directory import RunDirectory, write_json
from labkit.plots import report
from labkit.plots.shown import labeled_runs
from labkit.runs import checked
from labkit.runs.compare import compare
from labkit.runs.data import RunData
from labkit.runs.follow import figures, summary_text
from labkit.runs.summarize import summarize
from tests.runs.record import record


@pytest.fixture
def diverged(labkit_home: Path) -> RunDirectory:
    """A finished run whose last held-out loss and accuracy are null, as ranks write NaN and infinity."""
    directory = record(labkit_home, "20260101-0000-diverged", [0.01] * 40, "layout.dp_replicate=1")
    event = {"event": "evaluation", "rank": 0, "step": 40, "metrics": {"loss": None, "accuracy": None, "name": "x"}}
    with directory.events(0).open("a") as file:
        file.write(json.dumps(event) + "\n")
    write_json(directory.summary, summarize(directory).as_dict())
    return directory


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (0.5, 0.5), (None, math.nan), (math.inf, math.nan), pytest.param(10**400, math.nan, id="huge")],
)
def test_a_figure_that_is_not_finite_is_kept_as_such(value: object, number: float) -> None:
    assert checked.figure(value) == pytest.approx(number, nan_ok=True)
    assert checked.figure("0.5") is None
    assert checked.figure(True) is None


def test_the_summary_says_it_in_words_and_stays_valid(diverged: RunDirectory) -> None:
    written = json.loads(diverged.summary.read_text(), parse_constant=pytest.fail)
    assert written["metrics"] == {"loss": "not finite", "accuracy": "not finite"}
    assert written["accuracy"] is None
    assert "the held-out loss and accuracy after step 40 are not finite" in written["notes"]
    printed = summary_text(written)
    assert "loss                   not finite" in printed
    assert "accuracy               not finite" in printed


def test_the_screen_says_it(diverged: RunDirectory) -> None:
    data = RunData(diverged)
    data.refresh()
    assert figures(data).endswith("accuracy not finite")


def test_comparison_and_report_say_it(diverged: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compare([diverged])
    assert "not finite" in str(comparison).splitlines()[2]
    assert "Held-out accuracy is not finite after 40 steps" in report.page(labeled_runs([diverged]), comparison)
    assert cli.main(["compare", diverged.id, "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert (row["final"], row["loss"]) == ("not finite", "not finite")


def test_figures_of_converted_networks_say_it_too(diverged: RunDirectory) -> None:
    event = {"event": "quantized", "method": "int8", "layers": 1, "samples": 8, "seconds": 0.1}
    event |= {"bytes": {"float": 8, "quantized": 2}, "latency_seconds": {"1": {"float": 2.0, "quantized": 1.0}}}
    event |= {"metrics": {"float": {"loss": 0.5}, "quantized": {"loss": None}}, "sensitivity": []}
    with diverged.events(0).open("a") as file:
        file.write(json.dumps({"rank": 0} | event) + "\n")
    built = summarize(diverged)
    assert (built.quantized or {})["metrics"] == {"float": {"loss": 0.5}, "quantized": {"loss": "not finite"}}
    assert "Change" in (page := report.page(labeled_runs([diverged]), compare([diverged])))
    assert "loss not finite" in page
