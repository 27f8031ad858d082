"""The report is one file that needs nothing, shows everything as text, and says what went wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from labkit.plots.report import report
from tests.plots.fake_run import FakeRun

EVIL = "<img src=x onerror=alert(1)>"
CLOSING = "</script><script>alert(1)</script>"


@pytest.fixture
def text(tmp_path: Path) -> str:
    one = FakeRun(tmp_path, "one", ranks=1).train(step_s=0.04)
    two = FakeRun(tmp_path, "two").train(step_s=0.0218)
    bad = FakeRun(tmp_path, "bad")
    bad.set(title=EVIL, warnings=[CLOSING])
    bad.advance(40).event(1, "error", type="ValueError", message=CLOSING, traceback=f"Traceback\n  {EVIL}")
    bad.end(
        "failed", cause={"kind": "exception", "rank": 1, "message": f"rank 1 raised: {EVIL}", "log": [CLOSING, "  x"]}
    )
    bad.directory.environment.write_text(f'{{"host": "{EVIL}"}}')
    path = report([one, two, bad], tmp_path / "out" / "report.html")
    assert path == tmp_path / "out" / "report.html"
    return path.read_text()


def without_plotly(text: str) -> str:
    """The page without plotly's own code."""
    return re.sub(r"<script>.{100000,}?</script>", "", text, flags=re.DOTALL)


def test_it_tells_the_finding_the_baseline_and_the_failure(text: str) -> None:
    page = without_plotly(text)
    for words in (
        "2 ranks train 1.8",
        "Baseline: one.",
        "rank 1 raised:",
        "Last lines of the log",
        "training.global_batch",
    ):
        assert words in page


def test_nothing_from_a_run_becomes_markup(text: str) -> None:
    page = without_plotly(text)
    assert "<img" not in page
    assert "alert(1)</script>" not in page
    assert page.count("<script>") == page.count("</script>") == 1
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_it_needs_no_network_and_forbids_it(text: str) -> None:
    page = without_plotly(text)
    assert "default-src &#x27;none&#x27;" in page
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert text.count("<script>") == 2
    assert '"showSendToCloud": false' in page


def test_one_run_reports_into_its_own_directory(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "alone", ranks=1).train(40)
    path = report(run)
    assert path == run.directory.path / "report.html"
    assert "vision 1 (1 rank)" in path.read_text()


def test_a_report_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        report([])


def test_a_directory_full_of_rubbish_still_reports(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "rubbish", ranks=1)
    run.directory.experiment.write_text('{"workload": 3}')
    run.directory.environment.write_text("[1]")
    run.set(cause="text", warnings="text", title=["x"])
    assert "The experiment cannot be read." in report(run).read_text()
