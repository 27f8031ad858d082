"""`Lab`: settings at the left, the picture at the right, Run and Stop between them."""

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

    `experiment` is an Experiment or the name of a recipe; `knobs` are the dotted fields that the lesson is about (the
    others stand under Advanced); `ui` is auto, live or static; `height` is that of the figure in pixels. Raises
    ExperimentError for an unknown recipe or knob.

    Everything a button does is a method: `run()`, `stop()`, `baseline()`, `measure_ceiling()`, `code()`.
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
        self._slot: str | None = None
        self._experiment = recipe(experiment) if isinstance(experiment, str) else experiment
        self.runs: list[Any] = []
        """The runs of this lab (labkit.runs.run.Run), oldest first."""
        self._panel: Any = None
        if self.mode == "live":
            # Widgets are made only where somebody can see them: an executed notebook would store all of them.
            from labkit.ui.panel import Panel

            self._panel = Panel(self._experiment, knobs, self, height)
        else:
            for knob in knobs or ():
                self._experiment.get(knob)

    # -- the experiment ---------------------------------------------------------------------------------------------

    @property
    def experiment(self) -> Experiment:
        """What the form says now; ExperimentError while an entry of it cannot be read."""
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
        """The cell that does the same without widgets."""
        return code(self.experiment)

    # -- runs -------------------------------------------------------------------------------------------------------

    def run(self, wait: bool = False, timeout: float | None = None) -> Any:
        """Launch the experiment and return its Run: at once, or with `wait` when it has ended.

        Raises ExperimentError, and launches nothing, while there are problems; TimeoutError after `timeout` seconds of
        waiting (the run goes on).
        """
        return self._launch(self.experiment, wait, timeout)

    def baseline(self, wait: bool = False, timeout: float | None = None) -> Any:
        """Launch the same experiment on one rank: what speed-ups refer to."""
        return self._launch(as_baseline(self.experiment), wait, timeout)

    def measure_ceiling(self, wait: bool = False, timeout: float | None = None) -> Any:
        """Launch independent copies on as many ranks: what the machine can give when nobody has to wait."""
        return self._launch(as_ceiling(self.experiment), wait, timeout)

    def sweep(self, over: Mapping[str, Sequence[Any]], name: str = "sweep", wait: bool = True) -> Any:
        """Run every combination of the values in `over`, by field, from the experiment of the form, in a queue.

        An interrupt stops it in the middle; the same call goes on where it stopped. With `wait=False` it goes on in
        the background: `sweep.stop()`, `sweep.wait()`. Its runs are shown here as they end.
        """
        from labkit.launch.sweep import sweep

        queue, seen = sweep(self.experiment, over, name), set[str]()

        def show(queue: Any) -> None:
            for run in queue.runs:
                if run.id not in seen:
                    seen.add(run.id)
                    self._add(run)

        show(queue)  # what an earlier call has run
        queue.listeners.append(show)
        return queue.run() if wait else queue.start()

    def stop(self) -> None:
        """Ask every run of this lab that goes on to finish its step, write a checkpoint and end. Returns at once."""
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
        """An earlier run on one rank that fits, so that the speed-up can be shown while the run goes on."""
        from labkit.runs.compare import find_baseline
        from labkit.runs.run import Run

        with contextlib.suppress(ExperimentError, OSError):
            found = find_baseline(run.directory) if run.experiment.layout.world_size > 1 else None
            if found is not None:
                self._add(Run(found))

    def _add(self, run: Any) -> None:
        if all(known.id != run.id for known in self.runs):
            self.runs.append(run)
        if self._panel:
            self._panel.watch(run)

    # -- results ----------------------------------------------------------------------------------------------------

    @property
    def comparison(self) -> Any:
        """The runs of this lab side by side (labkit.runs.compare.Comparison); one that cannot be read is left out."""
        from labkit.runs.compare import compare

        return compare(self.runs, skip_unreadable=True)

    def picture(self, against: str = "steps") -> Picture:
        """Loss, metric, throughput and speed-up as they are now, drawn against steps, time or bytes."""
        return overview.overview(self.runs, self.comparison if self.runs else (), self._height, against)

    def closeups(self) -> list[Picture]:
        """Of the runs that have ended: how their methods compare, where ranks combined what they learned in several
        ways; what sparse and narrow ones give, and with which numbers they compute; memory, traffic, pipelines and
        experts of the update that each of the latest runs traced.
        """
        from labkit.plots.closeup import closeups, combining, computing, sparse

        ended = [run for run in self.runs if run.done]
        return combining(ended) + sparse(ended) + computing(ended) + closeups(ended[-overview.SLOTS :])

    def show(self) -> None:
        """Display the picture statically, with its summary and its table, and the close-ups as tables in a fold.

        `for picture in lab.closeups(): picture.show()` draws those too.
        """
        static.show(self.picture())
        static.fold("Looked at closely", self.closeups())

    # -- display ----------------------------------------------------------------------------------------------------

    @property
    def widget(self) -> Any:
        """The widget that holds everything; None in static mode."""
        return self._panel.widget if self._panel else None

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if not self._panel:
            display({"text/plain": self._plain(), "text/html": f"<pre>{html.escape(self._plain())}</pre>"}, raw=True)  # type: ignore[no-untyped-call]
            if self.runs:
                self.show()
            return
        with contextlib.suppress(ImportError, AttributeError, OSError):
            from labkit.launch import warm

            warm()
        display(self._panel.widget)  # type: ignore[no-untyped-call]
        if self._record:
            # The place of the record: empty now, filled when a run ends. A saved notebook shows it without a kernel.
            # JupyterLab forgets such places when the page is reloaded; after that, `lab.show()` in a cell keeps one.
            self._slot = f"labkit-{secrets.token_hex(8)}"
            display({"text/plain": ""}, raw=True, display_id=self._slot)  # type: ignore[no-untyped-call]

    def _keep_record(self) -> None:
        """Put the picture as it is into the saved notebook."""
        if self._slot is None or not self.runs:
            return
        from IPython.display import display

        picture = overview.overview(self._panel.dashboard.shown(), self._panel.dashboard.rows, self._height)
        display(static.bundle(picture), raw=True, display_id=self._slot, update=True)  # type: ignore[no-untyped-call]

    def _plain(self) -> str:
        lines = [f"Lab: {theme.plain(self.experiment)}"]
        lines += [f"Cannot run: {theme.plain(problem, 400)}" for problem in self.problems]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Lab of {self._experiment.title!r}, {len(self.runs)} runs, {self.mode}>"


def as_baseline(experiment: Experiment) -> Experiment:
    """The same training on one rank."""
    name = f"{experiment.name} on 1 rank" if experiment.name else ""
    return one_process(experiment, name)


def as_ceiling(experiment: Experiment) -> Experiment:
    """The same number of ranks, each on its own."""
    return experiment.set({"launch.isolated": True})
