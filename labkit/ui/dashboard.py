"""The live view: one figure, the state of the ranks and one table, kept up to date by one thread that tails the files.

There is only one FigureWidget, because each one sends plotly's five megabytes to the browser. A thread keeps the kernel
free, and widgets accept values from any thread. It prints nothing (under ipykernel a thread's output appears in any
cell) and ends by itself when no run is in progress any more.
"""

from __future__ import annotations

import contextlib
import html
import threading
import time
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from labkit.experiment import Experiment, ExperimentError
from labkit.plots import gpus, overview, ranks, static, theme
from labkit.plots.against import TITLES
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.plots.table import html_table, runs_rows
from labkit.runs.comparison_row import ComparisonRow
from labkit.runs.data import RunData
from labkit.runs.data_used import data_used
from labkit.runs.gpu_use import gpu_uses
from labkit.ui.closeup import Closeup
from labkit.ui.figure_changes import send_changes
from labkit.ui.live_figure import LiveFigure
from labkit.ui.live_rows import comparison_rows, live_row
from labkit.ui.state_text import describe, status_html

REDRAW_S = 0.35
READ_S = 0.004
"""How long a redraw may read files (s); the rest is read in slices of this length before the next redraw."""
CATCH_UP_S = 0.01
"""Pause between two such slices (s), during which the kernel can use the interpreter."""
TABLES_S = 1.0
"""Interval at which the tables are rewritten (s)."""
BUSY_TIMEOUT_S = 2.0
"""A browser that has not answered the last redraw gets the next one only after this time (s)."""
RESYNC_S = 4.0
"""Interval at which the whole state of the figure is renewed in the kernel, from which a reloaded page reads it (s)."""


class Dashboard:
    """Widgets that show runs while they train. `watch(run)` starts the thread, which calls `redraw()` repeatedly."""

    def __init__(self, height: int = overview.HEIGHT, on_end: Callable[[], None] | None = None) -> None:
        self.figure = LiveFigure(overview.traces([], []), overview.layout([], [], height))
        self.figure._config = static.config()
        self.state = widgets.HTML(status_html("Ready."))
        self.progress = widgets.FloatProgress(min=0, max=1, value=0, layout={"width": "100%", "height": "10px"})
        self.progress.style = {"bar_color": theme.PALETTE[0]}
        self.strip = widgets.HTML()
        self.table = widgets.HTML()
        self.notice = ""
        """A sentence shown before the state, e.g. why a run could not be launched."""
        self.runs: list[Any] = []
        self.rows: list[ComparisonRow] = []
        """The comparison rows of the ended runs, and the estimate for the active one."""
        self._data: dict[str, RunData] = {}
        self._experiments: dict[str, Experiment | None] = {}
        self._last_drawn = (overview.traces([], []), overview.layout([], [], height))
        self._last_drawn_state: tuple[Any, ...] = ()
        self._last_compared: tuple[tuple[str, str], ...] = ()
        self._ended_rows: list[ComparisonRow] = []
        self._on_end = on_end
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._drawn_at = self._synced_at = self._tables_written_at = 0.0
        self.closeup = Closeup(self.all_runs, self.displayed_runs)
        self.x_axis = widgets.ToggleButtons(
            options=list(overview.X_AXES),
            value=overview.X_AXES[0],
            description="Horizontal axis",
            tooltip="Horizontal axis of the curves: optimizer steps, training time or bytes sent",
            tooltips=[TITLES[name] for name in overview.X_AXES],
            style={"button_width": "auto", "description_width": "initial"},
            layout={"width": "auto"},
        )
        self.x_axis.observe(self._on_x_axis_change, "value")
        self.widget = widgets.VBox([self.x_axis, self.figure, self.strip, self.table, self.closeup.widget])

    # -- runs -------------------------------------------------------------------------------------------------------

    def watch(self, run: Any) -> None:
        """Show a run (Run) from now on, and keep its display up to date until it ends."""
        with self._lock:
            if all(existing.id != run.id for existing in self.runs):
                self.runs.append(run)
                self._data[run.id] = RunData(run.directory)
                self._experiment(run)
            if self._thread is None or not self._thread.is_alive():
                self._stop.clear()
                self._thread = threading.Thread(target=self._loop, name="labkit-dashboard", daemon=True)
                self._thread.start()

    @property
    def active(self) -> Any:
        """The latest run that has not ended, or None."""
        return next((run for run in reversed(self.runs) if not run.done), None)

    @property
    def running(self) -> bool:
        """Whether the thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def close(self, timeout: float = 2.0) -> None:
        """End the thread, and wait up to `timeout` seconds for it."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def say(self, sentence: str) -> None:
        """Show a sentence before the state."""
        self.notice = sentence
        self._write_state()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        """Redraw until all runs have ended and everything has been read. Runs in the thread."""
        while not self._stop.is_set():
            start = time.monotonic()
            run_count, in_progress = 0, True
            try:
                run_count, in_progress = len(self.runs), self.active is not None
                # the state is read first, so that everything written before the end is read too
                read_all = self.redraw(force=not in_progress)
            except Exception as error:
                # No exception may escape: the traceback of a thread would be printed into whatever cell is running.
                self.notice = f"The figure could not be drawn ({type(error).__name__}: {theme.plain(error, 200)})."
                with contextlib.suppress(Exception):
                    self._write_state()
                read_all = True
            if not in_progress and read_all:
                with contextlib.suppress(Exception):
                    self.sync()
                    self.closeup.refresh()
                    if self._on_end is not None:
                        self._on_end()
                with self._lock:
                    if run_count == len(self.runs):  # otherwise a run was added meanwhile, and the thread continues
                        self._thread = None
                        return
            while not read_all and time.monotonic() - start < REDRAW_S and not self._stop.wait(CATCH_UP_S):
                with self._lock, contextlib.suppress(Exception):
                    read_all = self._read()
            self._stop.wait(max(CATCH_UP_S, REDRAW_S - (time.monotonic() - start)))

    def redraw(self, force: bool = False) -> bool:
        """Read new data and show it; return whether everything has been read."""
        with self._lock:
            read_all = self._read()
            state = tuple((run.id, run.done, data.steps, len(data.evaluations)) for run, data in self._pairs())
            if force or state != self._last_drawn_state:
                self._update_comparison(read_all)
                if force or not self._browser_busy():
                    self._draw()
                    self._last_drawn_state = state if read_all else ()
            self._write_state()
            if force or time.monotonic() - self._tables_written_at > TABLES_S:
                self._tables_written_at = time.monotonic()
                self._write_tables()
            if time.monotonic() - self._synced_at > RESYNC_S:
                self.sync()
            return read_all

    def _read(self) -> bool:
        """Read files for up to READ_S seconds; return whether everything has been read."""
        slice_s = READ_S / max(1, len(self._data))
        unread = [data for data in self._data.values() if not data.refresh(slice_s)]
        return not unread

    def _pairs(self) -> list[tuple[Any, RunData]]:
        """Return the runs with their data."""
        return [(run, self._data[run.id]) for run in self.runs]

    def _browser_busy(self) -> bool:
        """Return whether the browser is still drawing; further updates would then accumulate in its queue."""
        return self.figure.busy and time.monotonic() - self._drawn_at < BUSY_TIMEOUT_S

    def _draw(self) -> None:
        """Send the properties of the figure that have changed since the last redraw."""
        runs = self.displayed_runs()
        traces = overview.traces(runs, self.rows, self.x_axis.value)
        layout = overview.layout(runs, self.rows, x_axis=self.x_axis.value)
        if send_changes(self.figure, self._last_drawn, (traces, layout)):
            self._drawn_at = time.monotonic()
        self._last_drawn = (traces, layout)

    def sync(self) -> None:
        """Renew the state of the figure that a reloaded page reads."""
        self._synced_at = time.monotonic()
        self.figure.renew()

    def _on_x_axis_change(self, _change: Any) -> None:
        """Redraw the curves over another quantity."""
        with self.figure.batch_update():
            for name in ("xaxis", "xaxis2", "xaxis3"):  # the old zoom is meaningless on the new axis
                self.figure.layout[name].autorange = True
        self.redraw(force=True)
        self.sync()

    def all_runs(self) -> list[LabeledRun]:
        """Return all runs."""
        return labeled_runs([LabeledRun.named(self._data[run.id], self._experiment(run)) for run in self.runs])

    def displayed_runs(self) -> list[LabeledRun]:
        """Return the runs of the figure: the latest ones, with the baseline if there is one."""
        runs = self.runs[-overview.SLOTS :]
        if len(self.runs) > len(runs) and not any(self._data[run.id].world_size == 1 for run in runs):
            base = [run for run in self.runs if self._data[run.id].world_size == 1]
            runs = [*base[-1:], *runs[1:]] if base else runs
        return labeled_runs([LabeledRun.named(self._data[run.id], self._experiment(run)) for run in runs])

    def _experiment(self, run: Any) -> Experiment | None:
        """Return the experiment of a run, which is read once; None if it cannot be read."""
        if run.id not in self._experiments:
            try:
                self._experiments[run.id] = run.experiment
            except ExperimentError:
                self._experiments[run.id] = None
        return self._experiments[run.id]

    # -- comparison -------------------------------------------------------------------------------------------------

    def _update_comparison(self, read_all: bool) -> None:
        """Update the rows: compare the ended runs if they have changed, and estimate the active one."""
        ended = [run for run in self.runs if run.done]
        key = tuple((run.id, run.state) for run in ended)
        if key != self._last_compared and read_all:
            self._last_compared = key
            self._ended_rows = comparison_rows([run.directory for run in ended])
        active = self.active
        experiment = self._experiment(active) if active is not None else None
        live = (
            live_row(experiment, self._data[active.id], self._comparable_rows(experiment))
            if experiment is not None
            else None
        )
        self.rows = [*self._ended_rows, *([live] if live else [])]

    def _comparable_rows(self, experiment: Experiment) -> list[ComparisonRow]:
        """Return the rows of ended runs whose speed can be compared with that of `experiment`."""
        from labkit.runs.compare import differences

        experiments = {run.id: self._experiments.get(run.id) for run in self.runs}
        return [
            row
            for row in self._ended_rows
            if (ended := experiments.get(row.run_id)) is not None and not differences(experiment, ended)
        ]

    # -- text -------------------------------------------------------------------------------------------------------

    def _write_state(self) -> None:
        """Update the sentence about the state, and the progress bar."""
        run = self.active or (self.runs[-1] if self.runs else None)
        sentence = "Ready."
        if run is not None:
            status = run.status
            sentence, share = describe(status, self._data[run.id])
            self.progress.value = share
            colour = theme.PALETTE[1] if status.get("state") == "failed" else theme.PALETTE[0]
            if self.progress.style.bar_color != colour:
                self.progress.style.bar_color = colour
        _set_value(self.state, status_html(f"{self.notice} {sentence}".strip()))

    def _write_tables(self) -> None:
        """Update the tables of the ranks and of the runs."""
        run = self.active or (self.runs[-1] if self.runs else None)
        if run is not None:
            rows = ranks.rank_rows(self._data[run.id])
            sentence = html.escape(ranks.finding(rows))
            body = html_table(ranks.table_rows(rows), caption=f"Ranks of {run.title}")
            used = html.escape(theme.plain(data_used(self._data[run.id].facts), 400))
            about_data = f"<p>Data: {used}.</p>" if used else ""
            about_gpus = _gpus_html(self._data[run.id])
            _set_value(self.strip, f'<div class="labkit-scroll"><b>{sentence}.</b>{body}{about_gpus}{about_data}</div>')
        if self.rows:
            body = html_table(runs_rows(self.rows), caption="Runs of this lab")
            _set_value(self.table, f'<div class="labkit-scroll">{body}</div>')


def _gpus_html(data: RunData) -> str:
    """Return the table of the GPUs with the warnings about them; empty for a run on the CPU."""
    rows = gpus.table_rows(gpu_uses(data))
    table = html_table(rows, caption="GPUs so far") if rows else ""
    return table + "".join(f"<p>{html.escape(sentence)}.</p>" for sentence in gpus.sentences(data))


def _set_value(widget: Any, value: str) -> None:
    """Set the value of a widget if it differs, so that nothing is sent to the browser otherwise."""
    if widget.value != value:
        widget.value = value
