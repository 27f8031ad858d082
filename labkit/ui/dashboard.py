"""The live picture: one figure, one strip, one table, kept up to date by one thread that tails the files.

Why one FigureWidget: each one sends plotly's five megabytes to the browser. Why a thread: the kernel stays free, and
widgets take values from any thread. It prints nothing (under ipykernel a thread's prints land anywhere) and ends by
itself when nothing is going on any more.
"""

from __future__ import annotations

import contextlib
import html
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np

from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.run_directory import RunDirectory
from labkit.plots import overview, ranks, static, theme
from labkit.plots.against import TITLES
from labkit.plots.shown import LabeledRun, shown
from labkit.plots.table import html_table, runs_rows
from labkit.runs.data import RunData
from labkit.runs.data_used import data_used
from labkit.runs.methods import key, period
from labkit.runs.steady import SteadyState
from labkit.ui.closeup import Closeup
from labkit.ui.live_figure import LiveFigure

REDRAW_S = 0.35
READ_S = 0.004
"""How long a redraw may read files; what is left over is read in slices of this length before the next one."""
CATCH_UP_S = 0.01
"""Pause between two such slices: the interpreter belongs to the kernel."""
TABLES_S = 1.0
"""How often the tables are written anew."""
UNANSWERED_S = 2.0
"""A browser that has not answered the last redraw gets the next one after this time, and not sooner."""
RESYNC_S = 4.0
"""How often the figure's whole state is renewed in the kernel, which is where a reloaded page takes it from."""


class Dashboard:
    """Widgets that show runs while they train. `watch(run)` starts the thread; `redraw()` is one turn of it."""

    def __init__(self, height: int = overview.HEIGHT, on_end: Callable[[], None] | None = None) -> None:
        self.figure = LiveFigure(overview.traces([], []), overview.layout([], [], height))
        self.figure._config = static.config()
        self.state = widgets.HTML(_line("Ready."))
        self.progress = widgets.FloatProgress(min=0, max=1, value=0, layout={"width": "100%", "height": "10px"})
        self.progress.style = {"bar_color": theme.PALETTE[0]}
        self.strip = widgets.HTML()
        self.table = widgets.HTML()
        self.notice = ""
        """A sentence that stands before the state, e.g. why a run could not be launched."""
        self.runs: list[Any] = []
        self.rows: list[dict[str, Any]] = []
        """The comparison of the runs that have ended, and the estimate for the one that goes on."""
        self._data: dict[str, RunData] = {}
        self._experiments: dict[str, Experiment | None] = {}
        self._drawn = (overview.traces([], []), overview.layout([], [], height))
        self._seen: tuple[Any, ...] = ()
        self._compared: tuple[tuple[str, str], ...] = ()
        self._ended_rows: list[dict[str, Any]] = []
        self._on_end = on_end
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._sent = self._synced = self._tabled = 0.0
        self.closeup = Closeup(self.every, self.shown)
        self.against = widgets.ToggleButtons(
            options=list(overview.AGAINST),
            value=overview.AGAINST[0],
            description="Curves against",
            tooltip="What the curves are drawn against: updates, training time or bytes sent",
            tooltips=[TITLES[name] for name in overview.AGAINST],
            style={"button_width": "auto", "description_width": "initial"},
            layout={"width": "auto"},
        )
        self.against.observe(self._turned, "value")
        self.widget = widgets.VBox([self.against, self.figure, self.strip, self.table, self.closeup.widget])

    # -- what is shown ----------------------------------------------------------------------------------------------

    def watch(self, run: Any) -> None:
        """Show a run (Run) from now on, and keep it up to date while it goes on."""
        with self._lock:
            if all(known.id != run.id for known in self.runs):
                self.runs.append(run)
                self._data[run.id] = RunData(run.directory)
                self._experiment(run)
            if self._thread is None or not self._thread.is_alive():
                self._stop.clear()
                self._thread = threading.Thread(target=self._live, name="labkit-dashboard", daemon=True)
                self._thread.start()

    @property
    def active(self) -> Any:
        """The latest run that goes on, or None."""
        return next((run for run in reversed(self.runs) if not run.done), None)

    @property
    def running(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def close(self, timeout: float = 2.0) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def say(self, sentence: str) -> None:
        """Put a sentence before the state."""
        self.notice = sentence
        self._write_state()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            known, going_on = 0, True
            try:
                known, going_on = len(self.runs), self.active is not None
                # what was written before the end is seen, because the state is looked at first
                read_all = self.redraw(force=not going_on)
            except Exception as error:
                # Nothing may escape: a traceback from a thread would be printed into whatever cell is running.
                self.notice = f"The picture could not be drawn ({type(error).__name__}: {theme.plain(error, 200)})."
                with contextlib.suppress(Exception):
                    self._write_state()
                read_all = True
            if not going_on and read_all:
                with contextlib.suppress(Exception):
                    self.sync()
                    self.closeup.offer()
                    if self._on_end is not None:
                        self._on_end()
                with self._lock:
                    if known == len(self.runs):  # else a run was added meanwhile, and the thread goes on for it
                        self._thread = None
                        return
            while not read_all and time.monotonic() - begun < REDRAW_S and not self._stop.wait(CATCH_UP_S):
                with self._lock, contextlib.suppress(Exception):
                    read_all = self._read()
            self._stop.wait(max(CATCH_UP_S, REDRAW_S - (time.monotonic() - begun)))

    def redraw(self, force: bool = False) -> bool:
        """Read what is new and show it; True when everything there is has been read."""
        with self._lock:
            read_all = self._read()
            known = tuple((run.id, run.done, data.steps, len(data.evaluations)) for run, data in self._pairs())
            if force or known != self._seen:
                self._compare(read_all)
                if force or not self._unanswered():
                    self._draw()
                    self._seen = known if read_all else ()
            self._write_state()
            if force or time.monotonic() - self._tabled > TABLES_S:
                self._tabled = time.monotonic()
                self._write_tables()
            if time.monotonic() - self._synced > RESYNC_S:
                self.sync()
            return read_all

    def _read(self) -> bool:
        slice_s = READ_S / max(1, len(self._data))
        unread = [data for data in self._data.values() if not data.refresh(slice_s)]
        return not unread

    def _pairs(self) -> list[tuple[Any, RunData]]:
        return [(run, self._data[run.id]) for run in self.runs]

    def _unanswered(self) -> bool:
        """Whether the browser is still busy with the last redraw: without this, updates would pile up in its queue."""
        return self.figure.busy and time.monotonic() - self._sent < UNANSWERED_S

    def _draw(self) -> None:
        many = self.shown()
        traces = overview.traces(many, self.rows, self.against.value)
        layout = overview.layout(many, self.rows, against=self.against.value)
        before, shape = self._drawn
        changed = [_differences(old, new) for old, new in zip(before, traces, strict=True)]
        with self.figure.batch_update():
            for trace, changes in zip(self.figure.data, changed, strict=True):
                for name, value in changes.items():
                    trace[name] = value
            for at, (old, new) in enumerate(zip(shape["annotations"], layout["annotations"], strict=True)):
                if old["text"] != new["text"]:
                    self.figure.layout.annotations[at].text = new["text"]
            for name in overview.AXES:
                old, new = shape[name], layout[name]
                if old["title"] != new["title"]:
                    self.figure.layout[name].title.text = new["title"]["text"]
                if old["showticklabels"] != new["showticklabels"]:
                    self.figure.layout[name].showticklabels = new["showticklabels"]
        self._drawn = (traces, layout)
        if any(changed):
            self._sent = time.monotonic()

    def sync(self) -> None:
        """Renew the state that a reloaded page reads."""
        self._synced = time.monotonic()
        self.figure.renew()

    def _turned(self, _change: Any) -> None:
        """The curves are to be drawn against something else."""
        with self.figure.batch_update():
            for name in ("xaxis", "xaxis2", "xaxis3"):  # what was zoomed to means nothing there
                self.figure.layout[name].autorange = True
        self.redraw(force=True)
        self.sync()

    def every(self) -> list[LabeledRun]:
        """All runs."""
        return shown([LabeledRun.named(self._data[run.id], self._experiment(run)) for run in self.runs])

    def shown(self) -> list[LabeledRun]:
        """The runs of the figure: the latest ones, with the baseline if there is one."""
        runs = self.runs[-overview.SLOTS :]
        if len(self.runs) > len(runs) and not any(self._data[run.id].world_size == 1 for run in runs):
            base = [run for run in self.runs if self._data[run.id].world_size == 1]
            runs = [*base[-1:], *runs[1:]] if base else runs
        return shown([LabeledRun.named(self._data[run.id], self._experiment(run)) for run in runs])

    def _experiment(self, run: Any) -> Experiment | None:
        """What a run runs, read once; None if it cannot be read."""
        if run.id not in self._experiments:
            try:
                self._experiments[run.id] = run.experiment
            except ExperimentError:
                self._experiments[run.id] = None
        return self._experiments[run.id]

    # -- comparison -------------------------------------------------------------------------------------------------

    def _compare(self, read_all: bool) -> None:
        """Compare the runs that have ended, once; estimate the one that goes on, each time."""
        ended = [run for run in self.runs if run.done]
        key = tuple((run.id, run.state) for run in ended)
        if key != self._compared and read_all:
            self._compared = key
            self._ended_rows = compared([run.directory for run in ended])
        active = self.active
        experiment = self._experiment(active) if active is not None else None
        live = live_row(experiment, self._data[active.id], self._bases(experiment)) if experiment is not None else None
        self.rows = [*self._ended_rows, *([live] if live else [])]

    def _bases(self, experiment: Experiment) -> list[dict[str, Any]]:
        """The rows of ended runs whose speed can be compared with that of `experiment`."""
        from labkit.runs.compare import differences

        known = {run.id: self._experiments.get(run.id) for run in self.runs}
        return [
            row
            for row in self._ended_rows
            if (other := known.get(row["run_id"])) is not None and not differences(experiment, other)
        ]

    # -- words ------------------------------------------------------------------------------------------------------

    def _write_state(self) -> None:
        run = self.active or (self.runs[-1] if self.runs else None)
        said = "Ready."
        if run is not None:
            status = run.status
            said, share = describe(status, self._data[run.id])
            self.progress.value = share
            colour = theme.PALETTE[1] if status.get("state") == "failed" else theme.PALETTE[0]
            if self.progress.style.bar_color != colour:
                self.progress.style.bar_color = colour
        _put(self.state, _line(f"{self.notice} {said}".strip()))

    def _write_tables(self) -> None:
        run = self.active or (self.runs[-1] if self.runs else None)
        if run is not None:
            rows = ranks.rank_rows(self._data[run.id])
            sentence = html.escape(ranks.finding(rows))
            body = html_table(ranks.twin(rows), caption=f"Ranks of {run.title}")
            used = html.escape(theme.plain(data_used(self._data[run.id].facts), 400))
            about_data = f"<p>Data: {used}.</p>" if used else ""
            _put(self.strip, f'<div class="labkit-scroll"><b>{sentence}.</b>{body}{about_data}</div>')
        if self.rows:
            body = html_table(runs_rows(self.rows), caption="Runs of this lab")
            _put(self.table, f'<div class="labkit-scroll">{body}</div>')


def compared(directories: Sequence[RunDirectory]) -> list[dict[str, Any]]:
    """The rows of a comparison; a run that cannot be read is left out."""
    from labkit.runs.compare import compare

    with contextlib.suppress(ExperimentError, FileNotFoundError, OSError):
        return list(compare(directories, skip_unreadable=True).rows)
    return []


def live_row(experiment: Experiment, data: RunData, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The run that goes on, with its speed-up so far over the latest baseline in `rows`; None before its first step."""
    if not data.steps or not len(data.seconds[0]):
        return None
    steady = SteadyState.of(data.seconds[0].astype(np.float64), period(experiment))
    median = steady.median
    median = median if median is not None and np.isfinite(median) else None
    base = next((row for row in reversed(rows) if row["is_baseline"] and row["step_seconds"]), None)
    size = data.world_size
    speedup = base["step_seconds"] / median if base and median and not steady.reason and size > 1 else None
    ceiling = next((row["ceiling"] for row in reversed(rows) if row["is_ceiling"] and row["world_size"] == size), None)
    return {
        "run_id": data.directory.id,
        "title": data.status.get("title") or experiment.title,
        "workload": experiment.workload.name,
        "layout": str(experiment.layout),
        "method": key(experiment),
        "world_size": size,
        "device": experiment.launch.device,
        "state": data.state,
        "global_batch": experiment.training.global_batch,
        "steps": data.steps,
        "metric": data.metric.get("key"),
        "final": None,
        "loss": None,
        "samples_per_second": experiment.training.global_batch / median if median else None,
        "step_seconds": median,
        "speedup": None if experiment.launch.isolated else speedup,
        "speedup_low": None,
        "speedup_high": None,
        "efficiency": None if speedup is None or experiment.launch.isolated else speedup / size,
        "ceiling": ceiling,
        "is_baseline": False,
        "is_ceiling": experiment.launch.isolated and size > 1,
        "notes": [],
        "live": True,
    }


def describe(status: dict[str, Any], data: RunData) -> tuple[str, float]:
    """The state in words, and the share of the steps that is done: `Running, step 40 of 200, 12 s left`."""
    done, total = data.first + data.steps, data.total_steps
    share = min(1.0, done / total) if total else 0.0
    state = str(status.get("state", "starting"))
    of = f"step {done:,} of {total:,}" if total else f"step {done:,}"
    if state == "running" and done == data.first:
        return "Starting, no step yet.", share
    if state == "running":
        left = _left(data, total)
        return f"Running, {of}{f', {left} left' if left else ''}.", share
    if state in ("starting", "stopping"):
        return f"{state.capitalize()}, {of}.", share
    cause = status.get("cause")
    why = theme.plain(cause.get("message"), 300) if isinstance(cause, dict) and cause.get("message") else ""
    return f"{state.capitalize()} after {of}{f': {why}' if why and state == 'failed' else ''}.", share


def _left(data: RunData, total: int | None) -> str:
    """Time left at the pace of the last steps, evaluations included."""
    elapsed = data.elapsed
    if total is None or len(elapsed) < 3:
        return ""
    recent = elapsed[-min(len(elapsed), 200) :]
    seconds = (total - data.first - len(elapsed)) * float(recent[-1] - recent[0]) / (len(recent) - 1)
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(0.0, seconds):.0f} s"


def _differences(old: Any, new: dict[str, Any]) -> dict[str, Any]:
    """What a redraw has to replace in a trace: arrays that changed, and the words."""
    found: dict[str, Any] = {}
    for name in ("x", "y", "text", "name", "showlegend", "mode", "hovertemplate"):
        if name in new and not _same(old[name], new[name]):
            found[name] = new[name]
    if new["type"] == "bar" and found:
        found |= {part: new[part] for part in ("error_y", "marker", "width")}
    return found


def _same(before: Any, after: Any) -> bool:
    if not isinstance(after, list | np.ndarray):
        return bool(before == after)
    return before is not None and len(before) == len(after) and np.array_equal(before, after, equal_nan=_numeric(after))


def _numeric(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind == "f"


def _line(sentence: str) -> str:
    return f'<div role="status" aria-live="polite" class="labkit-state">{html.escape(sentence)}</div>'


def _put(widget: Any, value: str) -> None:
    if widget.value != value:
        widget.value = value
