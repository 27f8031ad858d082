"""The lab in the real JupyterLab, seen by a real browser, training for real."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.jupyter import (
    PICTURES,
    Jupyter,
    browser,
    eventually,
    lengths,
    open_notebook,
    save,
    state,
    steps_done,
)

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]

EVIL = "<img src=x onerror=alert(1)>"
CELL = """from labkit.experiment.recipes import recipe
from labkit.ui import Lab
lab = Lab(recipe("vision-ddp").replace("layout.dp_replicate=1", "training.steps={steps}", "training.evaluate_every=50",
    "workload.image_size=8", "workload.width=4", "workload.depth=1", "training.global_batch=16"{more}))
lab"""
LOSS = 1
"""Place of the first run's loss in the figure."""


def cell(steps: int = 100_000, *more: str) -> str:
    return CELL.format(steps=steps, more="".join(f", {change!r}" for change in more))


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    place = tmp_path_factory.mktemp("jupyter")
    server = Jupyter(place)
    yield server
    server.close()
    PICTURES.mkdir(exist_ok=True)
    shutil.copy(place / "jupyter.log", PICTURES / "jupyter.log")


@pytest.fixture
def page(request: pytest.FixtureRequest) -> Iterator[Any]:
    with browser() as found:
        found.dialogs = []

        def answer(dialog: Any) -> None:
            if dialog.type == "beforeunload":  # "leave this page?"
                dialog.accept()
            else:
                found.dialogs.append(dialog.message)
                dialog.dismiss()

        found.on("dialog", answer)
        yield found
        picture(found, f"last-{request.node.name[:40]}")  # what was on the screen when a test ended, or failed


def picture(page: Any, name: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def button(page: Any, words: str) -> Any:
    return page.get_by_role("button", name=words, exact=True)


def shown_lab(page: Any) -> None:
    page.wait_for_selector(".labkit-lab .js-plotly-plot .main-svg")


def settled(page: Any) -> list[int]:
    """The number of points once nothing is drawn any more."""
    before: list[int] = []
    while (now := lengths(page)) != before:
        before = now
        time.sleep(2.5)
    return now


def test_choose_two_ranks_run_watch_stop_and_reload(jupyter: Jupyter, page: Any) -> None:
    open_notebook(page, jupyter.notebook("lab.ipynb", cell(), "'the kernel is ' + 'free'"))
    shown_lab(page)
    picture(page, "1-ready")

    ranks = page.get_by_label("Data-parallel ranks")
    ranks.fill("2")
    eventually(lambda: "2 ranks hold a copy" in page.locator(".labkit-lab").inner_text(), what="the rank grid follows")
    button(page, "Run").click()
    eventually(lambda: "Running" in state(page), what="the run starts")
    first = eventually(lambda: (lengths(page) or [0, 0])[LOSS], what="the curve begins")
    eventually(lambda: lengths(page)[LOSS] > first, what="the curve moves")
    picture(page, "2-running")

    page.locator(".jp-Notebook .jp-CodeCell").nth(1).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    page.get_by_text("'the kernel is free'", exact=True).wait_for()

    # The browser that comes back finds the run where it is, not where it left it.
    before = steps_done(state(page))
    save(page, jupyter.root / "lab.ipynb")
    page.reload()
    shown_lab(page)
    eventually(lambda: steps_done(state(page)) > before, what="the run goes on after the reload")
    eventually(lambda: (lengths(page) or [0, 0])[LOSS] > 0, what="the curve is there after the reload")
    assert not page.locator(".jp-OutputArea-child:has-text('model not found')").count()

    button(page, "Stop").click()
    eventually(lambda: "Stopped after" in state(page), what="Stop stops")
    drawn = settled(page)
    picture(page, "3-stopped")
    page.reload()
    shown_lab(page)
    eventually(lambda: lengths(page) == drawn, what="a reload keeps the curve of a run that has ended")
    names = page.locator(".labkit-lab .legendtext").all_text_contents()
    assert any("2 ranks" in name for name in names)
    picture(page, "4-reloaded")


def test_the_saved_notebook_holds_a_small_record(jupyter: Jupyter, page: Any) -> None:
    open_notebook(page, jupyter.notebook("record.ipynb", cell(200)))
    shown_lab(page)
    button(page, "Run").click()
    eventually(lambda: "Finished" in state(page), seconds=120)
    time.sleep(1.5)
    assert (
        page.locator(".jp-OutputArea-child .js-plotly-plot:visible").count() == 1
    )  # the record waits until it is needed
    save(page, jupyter.root / "record.ipynb")

    def record() -> Any:
        text = (jupyter.root / "record.ipynb").read_text()
        outputs = json.loads(text)["cells"][0]["outputs"]
        found = [out["data"] for out in outputs if "application/vnd.plotly.v1+json" in out.get("data", {})]
        return (text, found[0]) if found else None

    text, data = eventually(record, what="the record is in the file")
    assert len(text) < 300_000
    assert "Held-out accuracy" in "".join(data["text/plain"])
    assert data["application/vnd.plotly.v1+json"]["config"]["showSendToCloud"] is False
    assert "<table" in "".join(data["text/html"])


def test_the_fold_opens_on_the_close_ups_of_a_run_that_has_ended(jupyter: Jupyter, page: Any) -> None:
    open_notebook(page, jupyter.notebook("closeup.ipynb", cell(60, "layout.dp_replicate=2")))
    shown_lab(page)
    fold = page.get_by_text("Details: methods")
    button(page, "Run").click()
    eventually(lambda: "Finished" in state(page), seconds=120)
    fold.first.click()
    drawn = page.locator(".labkit-lab .js-plotly-plot:visible")
    eventually(lambda: drawn.count() == 3, seconds=60, what="memory and traffic are drawn below the live figure")
    # A pattern without its colour behind it would be invisible: plotly draws it so where it has no template.
    behind = page.evaluate(
        "() => [...document.querySelectorAll('.labkit-lab pattern rect')].map((box) => box.style.fill || "
        "box.getAttribute('fill'))"
    )
    assert behind
    assert "none" not in behind
    picture(page, "9-closeup")


def test_the_keyboard_alone_is_enough(jupyter: Jupyter, page: Any) -> None:
    open_notebook(page, jupyter.notebook("keyboard.ipynb", cell()))
    shown_lab(page)

    def focused() -> str:
        return str(
            page.evaluate(
                "() => { const at = document.activeElement; return at.innerText || (at.labels && at.labels[0] ? "
                "at.labels[0].innerText : at.getAttribute('aria-label') || at.tagName); }"
            )
        ).strip()

    def tab_to(words: str) -> None:
        for _ in range(60):
            if focused() == words:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab never reaches {words!r}; it stands on {focused()!r}")

    page.get_by_label("Workload").focus()  # where the Tab key arrives after the cell above
    tab_to("Data-parallel ranks")
    page.keyboard.press("Control+a")
    page.keyboard.type("2")
    tab_to("Run")
    outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "the focus can be seen"
    page.keyboard.press("Enter")
    eventually(lambda: "Running" in state(page) and steps_done(state(page)) > 0)
    button(page, "Stop").wait_for()
    page.get_by_label("Workload").focus()
    tab_to("Stop")
    page.keyboard.press("Enter")
    eventually(lambda: "Stopped after" in state(page))


def test_a_name_full_of_markup_stays_text_and_nothing_is_shared(jupyter: Jupyter, page: Any) -> None:
    open_notebook(page, jupyter.notebook("evil.ipynb", cell(120, f"name={json.dumps(EVIL)}")))
    shown_lab(page)
    button(page, "Run").click()
    eventually(lambda: "Finished" in state(page), seconds=120)
    time.sleep(1)
    assert page.locator(".labkit-lab img[src='x']").count() == 0
    assert page.dialogs == []
    assert EVIL in page.locator(".labkit-lab").inner_text()
    assert any(EVIL in name for name in page.locator(".labkit-lab .legendtext").all_text_contents())
    page.locator(".labkit-lab .js-plotly-plot").hover()
    labels = [item.get_attribute("data-title") or "" for item in page.locator(".labkit-lab .modebar-btn").all()]
    assert labels, "the figure has its buttons"
    assert not [label for label in labels if "share" in label.lower() or "cloud" in label.lower()]
    picture(page, "5-markup")


def test_what_is_wrong_is_said_while_typing(jupyter: Jupyter, page: Any) -> None:
    open_notebook(page, jupyter.notebook("wrong.ipynb", cell(100)))
    shown_lab(page)
    page.get_by_label("Global batch").fill("0")
    eventually(lambda: "must be at least 1" in page.locator(".labkit-left").inner_text())
    assert button(page, "Run").is_disabled()
    picture(page, "6-problem")
    button(page, "Use 1").click()
    eventually(lambda: button(page, "Run").is_enabled())
    button(page, "Show code").click()
    eventually(lambda: "global_batch=1," in page.locator(".labkit-left textarea").input_value())
    page.get_by_role("button", name="Hide code").click()
    page.get_by_role("button", name="Advanced").click()
    page.get_by_role("button", name="Optimizer").click()
    time.sleep(1)
    picture(page, "7-advanced")


def test_the_report_opens_without_a_server(page: Any, tmp_path: Path) -> None:
    from labkit.plots.report import report
    from tests.plots.fake_run import FakeRun

    one = FakeRun(tmp_path, "one", ranks=1).train(step_s=0.04)
    two = FakeRun(tmp_path, "two").train(step_s=0.0218)
    bad = FakeRun(tmp_path, "bad")
    bad.set(title=EVIL)
    bad.advance(40).end("failed", cause={"kind": "exception", "rank": 1, "message": EVIL, "log": ["</pre>" + EVIL]})
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{report([one, two, bad], tmp_path / 'report.html')}")
    page.wait_for_selector("#figure-3 .main-svg")
    assert page.dialogs == []
    assert page.locator("img[src='x']").count() == 0
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    page.screenshot(path=PICTURES / "8-report.png", full_page=True)
