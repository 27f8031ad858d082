"""The lab without a browser: buttons are clicked, runs are faked, nothing is printed, threads end."""

from __future__ import annotations

import ast
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pytest

import labkit.launch
from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.recipes import RECIPES, recipe
from labkit.plots import static
from labkit.plots.against import HOVER, TITLES
from labkit.runs.data import RunData
from labkit.ui import Lab, closeup
from labkit.ui.mode import mode
from labkit.ui.show_code import code
from labkit.ui.state_text import describe
from tests.plots.fake_run import EXPERIMENT, FakeRun

EVIL = "<img src=x onerror=alert(1)>"


def eventually(check: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


class Launcher:
    """Stands for labkit.launch.launch: makes a run directory at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs: list[FakeRun] = []

    def __call__(self, experiment: Experiment, **_options: Any) -> FakeRun:
        experiment.check()
        ranks = experiment.layout.world_size
        self.runs.append(FakeRun(self.root, f"run-{len(self.runs)}", experiment, ranks))
        return self.runs[-1]


@pytest.fixture
def launcher(labkit_home: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    fake = Launcher(labkit_home)
    monkeypatch.setattr(labkit.launch, "launch", fake)
    return fake


@pytest.fixture
def lab(launcher: Launcher) -> Iterator[Lab]:
    lab = Lab(EXPERIMENT, ui="live")
    yield lab
    for run in launcher.runs:
        if not run.done:
            run.end("stopped")
    lab._panel.dashboard.close()


def words(lab: Lab) -> str:
    return str(lab._panel.dashboard.state.value)


def all_widgets(widget: Any) -> Iterator[Any]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from all_widgets(child)


def test_run_shows_the_curve_while_it_grows_and_the_thread_ends_with_it(lab: Lab, launcher: Launcher) -> None:
    panel = lab._panel
    panel.run_button.click()
    [run] = launcher.runs
    assert run.experiment == EXPERIMENT
    assert panel.run_button.disabled
    assert not panel.stop_button.disabled
    lengths = []
    for _ in range(3):
        run.advance(20)
        eventually(lambda: f"step {run.steps} of 200" in words(lab))
        eventually(lambda: len(panel.dashboard.figure.data[1].x) == run.steps or run.steps >= 60)
        lengths.append(len(panel.dashboard.figure.data[1].x))
    assert lengths[0] < lengths[1]
    run.train(200 - run.steps)
    eventually(lambda: not panel.dashboard.running)
    assert "Finished" in words(lab)
    assert panel.dashboard.progress.value == 1
    assert not panel.run_button.disabled
    assert panel.stop_button.disabled
    assert not [thread for thread in threading.enumerate() if thread.name == "labkit-dashboard"]


def test_what_a_reloaded_page_reads_is_what_was_drawn(lab: Lab, launcher: Launcher) -> None:
    lab.baseline()
    launcher.runs[0].train()
    eventually(lambda: not lab._panel.dashboard.running)
    lab.run()
    launcher.runs[1].train(step_s=0.0109)
    eventually(lambda: not lab._panel.dashboard.running)
    figure = lab._panel.dashboard.figure
    assert [len(trace.get("x", ())) for trace in figure._widget_data] == [len(trace.x) for trace in figure.data]
    assert list(figure._widget_data[-3]["x"]) == ["1 rank", "2 ranks"]
    assert "times faster than 1" in figure._widget_layout["annotations"][3]["text"]


def test_close_ups_are_made_when_they_are_opened(lab: Lab, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    fold = lab._panel.dashboard.closeup
    real = closeup.detail_figures
    monkeypatch.setattr(closeup, "detail_figures", lambda runs: made.append(len(runs)) or real(runs))
    lab.run()
    launcher.runs[0].trace().advance(20)
    eventually(lambda: "step 20 of 200" in words(lab))
    assert fold.widget.layout.display == "none", "nothing to open while the run goes on"
    launcher.runs[0].train(180)
    eventually(lambda: not lab._panel.dashboard.running)
    assert fold.widget.layout.display is None
    assert not made, "nobody has opened it"
    fold.widget.selected_index = 0
    assert made == [1]
    kinds = [set(output["data"]) for output in fold.output.outputs]
    assert kinds == [{static.PLOTLY_MIME, "text/plain"}, {"text/html", "text/plain"}] * 2, "memory and traffic"
    assert len(lab.closeups()) == 2
    lab.run()
    launcher.runs[1].trace().train()
    eventually(lambda: not lab._panel.dashboard.running)
    assert made[-1] == 2, "open, it follows the next run"


def test_the_fold_compares_methods_of_all_runs(lab: Lab, launcher: Launcher) -> None:
    fold = lab._panel.dashboard.closeup
    for method in ("none", "powersgd", "none", "none", "topk", "int8"):
        lab.experiment = lab.experiment.replace(f"gradients.compression.method={method}")
        lab.run()
        launcher.runs[-1].train(60, bytes=1000, exposed=0.002, compression=0.0)
        eventually(lambda: not lab._panel.dashboard.running)
    assert fold.widget.layout.display is None, "nothing was traced, but methods can be compared"
    fold.widget.selected_index = 0
    words = [output["data"]["text/plain"] for output in fold.output.outputs if static.PLOTLY_MIME in output["data"]]
    assert [sentence.split()[0] for sentence in words] == ["Plain", "Communication", "Plain"]
    assert [len(picture.rows) for picture in lab.closeups()] == [6, 6, 4]


def test_curves_can_be_turned_to_time_and_bytes(lab: Lab, launcher: Launcher) -> None:
    dashboard = lab._panel.dashboard
    lab.run()
    launcher.runs[0].advance(100, bytes=2**20)
    eventually(lambda: "step 100 of 200" in words(lab))
    for x_axis, end in (("time", 2.08), ("bytes", 200), ("steps", 100)):
        dashboard.x_axis.value = x_axis
        assert dashboard.figure.data[1].x[-1] == pytest.approx(end, rel=0.02)
        assert dashboard.figure.layout.xaxis3.title.text == TITLES[x_axis]
        assert dashboard.figure.data[1].hovertemplate.startswith(HOVER[x_axis])
    dashboard.x_axis.value = "time"
    launcher.runs[0].train(100, bytes=2**20)
    eventually(lambda: not dashboard.running)
    assert dashboard.figure.data[1].x[-1] == pytest.approx(4.16, rel=0.02), "and stay so while the run goes on"
    assert dashboard.figure._widget_layout["xaxis"]["title"]["text"] == TITLES["time"]


def test_what_the_browser_reports_does_not_change_the_figure(lab: Lab) -> None:
    figure = lab._panel.dashboard.figure
    figure.data[0].name = "kept"
    deltas = {"trace_deltas": [{"name": "x", "uid": "u"}], "trace_edit_id": figure._last_trace_edit_id}
    assert figure.busy
    figure._js2py_traceDeltas = deltas
    assert not figure.busy
    assert figure.to_dict()["data"][0]["name"] == "kept"


def test_stop_asks_the_run_to_stop(lab: Lab, launcher: Launcher) -> None:
    lab.run()
    launcher.runs[0].advance(20)
    lab._panel.stop_button.click()
    assert launcher.runs[0].asked_to_stop
    eventually(lambda: "Stopped after step 20" in words(lab))


def test_baseline_and_ceiling_are_the_same_experiment_elsewhere(lab: Lab, launcher: Launcher) -> None:
    experiment = lab.experiment
    lab._panel.baseline_button.click()
    launcher.runs[0].train(40)
    eventually(lambda: not lab._panel.dashboard.running)
    lab._panel.ceiling_button.click()
    base, ceiling = (run.experiment for run in launcher.runs)
    assert base.layout.world_size == 1
    assert ceiling.launch.isolated
    assert base.training == ceiling.training == experiment.training


def test_the_speedup_moves_while_the_run_goes_on(lab: Lab, launcher: Launcher) -> None:
    lab.baseline()
    launcher.runs[0].train(60, step_s=0.04)
    eventually(lambda: not lab._panel.dashboard.running)
    lab.run()
    launcher.runs[1].advance(40, step_s=0.022)
    eventually(lambda: "so far" in lab._panel.dashboard.figure.layout.annotations[3].text)
    bars = lab._panel.dashboard.figure.data[-3]
    assert bars.y[1] == pytest.approx(0.04 / 0.022, rel=0.1)


def test_an_earlier_baseline_is_found(lab: Lab, launcher: Launcher, labkit_home: Path) -> None:
    FakeRun(labkit_home, "earlier", ranks=1).train(60)
    lab.run()
    assert [run.id for run in lab.runs] == ["earlier", "run-0"]


def test_problems_disable_run_and_give_the_reason_and_a_way_out(lab: Lab, launcher: Launcher) -> None:
    panel = lab._panel
    lab._panel.form.set("training.global_batch", 1)
    assert panel.run_button.disabled
    assert "global_batch" in panel.run_button.tooltip
    [row] = panel.problems.children
    note, hint = row.children
    assert "at least 2 samples" in note.value
    assert hint.description == "Use 2"
    hint.click()
    assert not panel.run_button.disabled
    assert panel.problems.children == ()
    assert lab.experiment.training.global_batch == 2


def test_running_with_problems_launches_nothing(lab: Lab, launcher: Launcher) -> None:
    lab._panel.form.set("training.global_batch", 1)
    with pytest.raises(ExperimentError):
        lab.run()
    assert launcher.runs == []


def test_a_launch_that_fails_is_said_in_a_sentence(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_experiment: Experiment) -> None:
        raise OSError("no space in <home>")

    monkeypatch.setattr(labkit.launch, "launch", broken)
    lab._panel.run_button.click()
    assert "Not launched: no space in &lt;home&gt;" in words(lab)


def test_markup_in_a_name_or_a_file_is_text_in_every_widget(lab: Lab, launcher: Launcher) -> None:
    lab._panel.form.set("name", EVIL)
    lab.run()
    run = launcher.runs[0]
    run.set(workload=EVIL)
    run.advance(20)
    run.end("failed", cause={"kind": "exception", "rank": 0, "message": EVIL, "log": [EVIL]})
    eventually(lambda: not lab._panel.dashboard.running)
    drawn = [widget.value for widget in all_widgets(lab.widget) if isinstance(widget, widgets.HTML)]
    assert not [text for text in drawn if "<img" in text]
    assert any("&lt;img" in text for text in drawn)
    figure = lab._panel.dashboard.figure
    assert all("<img" not in (trace.name or "") for trace in figure.data)
    assert any("&lt;img" in (trace.name or "") for trace in figure.data)


def test_nothing_is_printed(lab: Lab, launcher: Launcher, capfd: pytest.CaptureFixture[str]) -> None:
    lab.run()
    launcher.runs[0].advance(20)
    launcher.runs[0].raw = launcher.runs[0].directory.events(0).open("ab")  # type: ignore[attr-defined]
    launcher.runs[0].raw.write(b"rubbish\n")  # type: ignore[attr-defined]
    launcher.runs[0].raw.close()  # type: ignore[attr-defined]
    launcher.runs[0].end("finished")
    eventually(lambda: not lab._panel.dashboard.running)
    assert capfd.readouterr() == ("", "")


def test_a_picture_that_cannot_be_drawn_is_said_and_does_not_kill_the_thread(
    lab: Lab, launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    dashboard = lab._panel.dashboard

    def broken(**_options: Any) -> bool:
        raise KeyError("x")

    monkeypatch.setattr(dashboard, "redraw", broken)
    lab.run()
    eventually(lambda: "could not be drawn (KeyError" in words(lab))
    launcher.runs[0].end("finished")
    eventually(lambda: not dashboard.running)
    assert capfd.readouterr() == ("", "")


def test_every_control_has_words_and_a_tooltip(lab: Lab) -> None:
    shows = widgets.HTML | widgets.FloatProgress
    controls = widgets.Button | widgets.widget_description.DescriptionWidget
    found = [one for one in all_widgets(lab.widget) if isinstance(one, controls) and not isinstance(one, shows)]
    assert len(found) > 40
    for widget in found:
        assert widget.description
        assert widget.tooltip


def test_the_share_button_is_off(lab: Lab) -> None:
    assert lab._panel.dashboard.figure._config["showSendToCloud"] is False


def test_show_code_prints_a_cell_that_makes_the_same_run(lab: Lab, launcher: Launcher) -> None:
    lab._panel.form.set("layout.dp_replicate", 1)
    lab._panel.code_button.click()
    assert lab._panel.code.layout.display == ""
    assert lab._panel.code.value == lab.code()
    lab._panel.form.set("training.seed", 5)
    assert "seed=5" in lab._panel.code.value
    lab._panel.code_button.click()
    assert lab._panel.code.layout.display == "none"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "change", ['name="it\'s"', 'launch.network={"rate_mbit": 5}', 'launch.slowdown={"1": 4}', "optimizer.clip_norm=2"]
)
def test_the_code_builds_the_same_experiment(name: str, change: str) -> None:
    experiment = recipe(name).replace(change)
    tree = ast.parse(code(experiment))
    tree.body = [node for node in tree.body if not _launches(node)]
    scope: dict[str, Any] = {}
    exec(compile(tree, "cell", "exec"), scope)
    assert scope["experiment"] == experiment


def _launches(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) or (isinstance(node, ast.Assign) and node.targets[0].id == "run")  # type: ignore[attr-defined]


def test_static_makes_no_widget_and_shows_the_picture(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(widgets.Widget, "__init__", lambda *_a, **_k: pytest.fail("a widget was made"))
    lab = Lab("vision-ddp", ui="static", knobs=["layout.dp_replicate"])
    assert lab.widget is None
    run = lab.run()
    run.train(40)
    assert lab.picture().data
    lab.show()
    assert "Held-out accuracy" in capsys.readouterr().out
    assert "experiment = Experiment(" in lab.code()


def test_the_mode_is_asked_for_or_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode() == "static"  # there is no notebook kernel here
    assert mode("live") == "live"
    monkeypatch.setenv("LABKIT_UI", "live")
    assert mode() == "live"
    assert mode("static") == "static"
    monkeypatch.setenv("LABKIT_UI", "holographic")
    with pytest.raises(ValueError, match="LABKIT_UI must be auto, live or static"):
        mode()
    with pytest.raises(ValueError, match="ui must be"):
        Lab(ui="fancy")


def test_a_lab_begins_with_a_recipe_that_exists() -> None:
    with pytest.raises(ExperimentError, match="unknown recipe"):
        Lab("vision-dpp", ui="static")


def test_the_state_is_words_with_the_time_left(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, "a", ranks=1)

    def said() -> str:
        data = RunData(run.directory)
        data.refresh()
        return describe(run.status, data)[0]

    assert said() == "Starting, no step yet."
    run.advance(40, step_s=0.1)
    assert said() == "Running, step 40 of 200, 17 s left."
    run.set(state="stopping")
    assert said() == "Stopping, step 40 of 200."
    run.end("failed", cause={"kind": "signal", "message": "rank 0 was killed by SIGKILL"})
    assert said() == "Failed after step 40 of 200: rank 0 was killed by SIGKILL."


def test_attach_shows_a_run_that_was_started_elsewhere(lab: Lab, labkit_home: Path) -> None:
    FakeRun(labkit_home, "elsewhere", ranks=1).train(40)
    run = lab.attach("elsewhere")
    eventually(lambda: not lab._panel.dashboard.running)
    assert run.id == "elsewhere"
    assert "Finished after step 40 of 200" in words(lab)
