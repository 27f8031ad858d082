"""`Lab`: settings and buttons on the left, the live figure on the right."""

from __future__ import annotations

import contextlib
import html
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.experiment import Experiment, ExperimentError, Problem
from labkit.experiment.one_process import one_process
from labkit.experiment.recipes import recipe
from labkit.plots import overview, static, theme
from labkit.plots.picture import Picture
from labkit.ui.mode import mode
from labkit.ui.show_code import code


class Lab:
    """A laboratory in a notebook: choose, run, watch, compare.

    `experiment` is an Experiment or the name of a recipe; `knobs` are the dotted fields shown first (all others are
    under Advanced); `ui` is auto, live or static; `height` is that of the figure in pixels. Raises ExperimentError for
    an unknown recipe or knob.

    Every button is also a method: `run()`, `stop()`, `baseline()`, `measure_ceiling()`, `code()`.
    """

    def __init__(
        self,
        experiment: Experiment | str = "vision-ddp",
        *,
        knobs: Sequence[str] | None = None,
        ui: str = "auto",
        height: int = overview.HEIGHT,
        record: bool = True,
    ) -> None:
        self.mode = mode(ui)
        self._height = height
        self._record = record
        self._record_id: str | None = None
        self._experiment = recipe(experiment) if isinstance(experiment, str) else experiment
        self.runs: list[Any] = []
        """The runs of this lab (labkit.runs.run.Run), oldest first."""
        self._panel: Any = None
        if self.mode == "live":
            # Widgets are created only if somebody can see them: an executed notebook would store all of them.
            from labkit.ui.panel import Panel

            self._panel = Panel(self._experiment, knobs, self, height)
        else:
            for knob in knobs or ():
                self._experiment.get(knob)

    # -- the experiment ---------------------------------------------------------------------------------------------

    @property
    def experiment(self) -> Experiment:
        """The experiment that the form describes; ExperimentError if an entry of it cannot be read."""
        return self._panel.form.value if self._panel else self._experiment

    @experiment.setter
    def experiment(self, experiment: Experiment) -> None:
        if self._panel:
            self._panel.form.value = experiment
        self._experiment = experiment

    @property
    def problems(self) -> list[Problem]:
        """Every reason why the experiment cannot run here."""
        return self._panel.form.problems if self._panel else self._experiment.problems()

    def code(self) -> str:
        """Return the code of a cell that does the same without widgets."""
        return code(self.experiment)

    # -- runs -------------------------------------------------------------------------------------------------------

    def run(self, wait: bool = False, timeout: float | None = None) -> Any:
        """Launch the experiment and return its Run at once, or with `wait` when it has ended.

        Raises ExperimentError, and launches nothing, if there are problems; TimeoutError after `timeout` seconds of
        waiting (the run continues).
        """
        return self._launch(self.experiment, wait, timeout)

    def baseline(self, wait: bool = False, timeout: float | None = None) -> Any:
        """Launch the same experiment on one rank, the reference for speed-ups."""
        return self._launch(as_baseline(self.experiment), wait, timeout)

    def measure_ceiling(self, wait: bool = False, timeout: float | None = None) -> Any:
        """Launch independent copies on the same number of ranks, the upper limit of throughput on this machine."""
        return self._launch(as_ceiling(self.experiment), wait, timeout)

    def sweep(self, over: Mapping[str, Sequence[Any]], name: str = "sweep", wait: bool = True) -> Any:
        """Run every combination of the values in `over`, by field, starting from the experiment of the form.

        An interrupt stops the sweep; the same call resumes it where it stopped. With `wait=False` it runs in the
        background: `sweep.stop()`, `sweep.wait()`. Its runs are shown here as they end.
        """
        from labkit.launch.sweep import sweep

        queue, shown_ids = sweep(self.experiment, over, name), set[str]()

        def show(queue: Any) -> None:
            for run in queue.runs:
                if run.id not in shown_ids:
                    shown_ids.add(run.id)
                    self._add(run)

        show(queue)  # the runs of an earlier call
        queue.listeners.append(show)
        return queue.run() if wait else queue.start()

    def stop(self) -> None:
        """Request every active run of this lab to finish its step, write a checkpoint and end. Returns at once."""
        for run in self.runs:
            if not run.done:
                run.request_stop()

    def attach(self, reference: Any = "last") -> Any:
        """Show a run that was started elsewhere: a Run, its id, its path, or `last`."""
        from labkit.runs.run import Run

        run = reference if hasattr(reference, "directory") else Run.attach(reference)
        self._add(run)
        return run

    def _launch(self, experiment: Experiment, wait: bool, timeout: float | None) -> Any:
        """Launch an experiment and show its run; wait for it if requested."""
        from labkit.launch import launch

        run = launch(experiment)
        self._find_baseline(run)
        self._add(run)
        if wait:
            run.wait(timeout)
            if not self._panel:
                self.show()
        return run

    def _find_baseline(self, run: Any) -> None:
        """Show a matching earlier run on one rank, so that the speed-up can be displayed during the run."""
        from labkit.runs.compare import find_baseline
        from labkit.runs.run import Run

        with contextlib.suppress(ExperimentError, OSError):
            baseline = find_baseline(run.directory) if run.experiment.layout.world_size > 1 else None
            if baseline is not None:
                self._add(Run(baseline))

    def _add(self, run: Any) -> None:
        """Show a run in this lab, unless it is shown already."""
        if all(existing.id != run.id for existing in self.runs):
            self.runs.append(run)
        if self._panel:
            self._panel.watch(run)

    # -- results ----------------------------------------------------------------------------------------------------

    @property
    def comparison(self) -> Any:
        """The comparison of the runs of this lab (labkit.runs.compare.Comparison), without unreadable ones."""
        from labkit.runs.compare import compare

        return compare(self.runs, skip_unreadable=True)

    def picture(self, x_axis: str = "steps") -> Picture:
        """Return the current figure of loss, metric, throughput and speed-up, over steps, time or bytes."""
        return overview.overview(self.runs, self.comparison if self.runs else (), self._height, x_axis)

    def closeups(self) -> list[Picture]:
        """Return the detail figures of the ended runs.

        They compare compressors and update rules, show sparsity and precision, and memory, traffic, pipelines and
        experts of the step that each of the latest runs traced.
        """
        from labkit.plots.closeup import detail_figures, method_figures, precision_figures, sparsity_figures

        ended = [run for run in self.runs if run.done]
        return (
            method_figures(ended)
            + sparsity_figures(ended)
            + precision_figures(ended)
            + detail_figures(ended[-overview.SLOTS :])
        )

    def show(self) -> None:
        """Display the figure statically, with its summary and its table, and the detail figures as folded tables.

        `for picture in lab.closeups(): picture.show()` draws the detail figures too.
        """
        static.show(self.picture())
        static.accordion("Details", self.closeups())

    # -- display ----------------------------------------------------------------------------------------------------

    @property
    def widget(self) -> Any:
        """The widget that contains everything; None in static mode."""
        return self._panel.widget if self._panel else None

    def _ipython_display_(self) -> None:
        """Display the widget, and a placeholder for the record of a saved notebook; in static mode, text and figure."""
        from IPython.display import display

        if not self._panel:
            display(
                {"text/plain": self._summary(), "text/html": f"<pre>{html.escape(self._summary())}</pre>"}, raw=True
            )  # type: ignore[no-untyped-call]
            if self.runs:
                self.show()
            return
        with contextlib.suppress(ImportError, AttributeError, OSError):
            from labkit.launch import warm

            warm()
        display(self._panel.widget)  # type: ignore[no-untyped-call]
        if self._record:
            # The placeholder of the record is filled when a run ends. A saved notebook shows it without a kernel.
            # JupyterLab forgets placeholders when the page is reloaded; then `lab.show()` in a cell makes a record.
            self._record_id = f"labkit-{secrets.token_hex(8)}"
            display({"text/plain": ""}, raw=True, display_id=self._record_id)  # type: ignore[no-untyped-call]

    def update_record(self) -> None:
        """Put the current figure into the saved notebook."""
        if self._record_id is None or not self.runs:
            return
        from IPython.display import display

        picture = overview.overview(self._panel.dashboard.displayed_runs(), self._panel.dashboard.rows, self._height)
        display(static.bundle(picture), raw=True, display_id=self._record_id, update=True)  # type: ignore[no-untyped-call]

    def _summary(self) -> str:
        """Return the experiment and its problems as text."""
        lines = [f"Lab: {theme.plain(self.experiment)}"]
        lines += [f"Cannot run: {theme.plain(problem, 400)}" for problem in self.problems]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Lab of {self._experiment.title!r}, {len(self.runs)} runs, {self.mode}>"


def as_baseline(experiment: Experiment) -> Experiment:
    """Return the experiment of the same training on one rank."""
    name = f"{experiment.name} on 1 rank" if experiment.name else ""
    return one_process(experiment, name)


def as_ceiling(experiment: Experiment) -> Experiment:
    """Return the experiment with the same number of ranks, each training an independent copy."""
    return experiment.set({"launch.isolated": True})
