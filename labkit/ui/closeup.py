"""An accordion below the live figure: methods, precision, memory, traffic, pipeline, experts, GPUs of the ended runs.

It costs nothing while a run is in progress: figures are drawn when it is opened, or when a run ends while it is open.
They are static outputs, not FigureWidgets, because each FigureWidget sends plotly's five megabytes to the browser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from labkit.plots import static
from labkit.plots.closeup import (
    detail_figures,
    gpu_figures,
    has_method_figures,
    method_figures,
    precision_figures,
    sparsity_figures,
)
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun

TITLE = "Details: methods by time and bytes, sparsity, precision, memory, traffic, pipeline, experts, GPUs"


class Closeup:
    """The accordion.

    `all_runs` returns every run, for figures that compare methods; `latest_runs` returns those of the live figure, for
    figures of the step that each of them traced.
    """

    def __init__(
        self, all_runs: Callable[[], Sequence[LabeledRun]], latest_runs: Callable[[], Sequence[LabeledRun]]
    ) -> None:
        self._all_runs, self._latest_runs = all_runs, latest_runs
        self._stale = True
        self.output = widgets.Output()
        self.widget = widgets.Accordion([self.output], titles=[TITLE], selected_index=None, layout={"display": "none"})
        self.widget.observe(self._on_toggle, "selected_index")

    def refresh(self) -> None:
        """Show the accordion after a run has ended, and redraw its figures if it is open."""
        self._stale = True
        runs = self._all_runs()
        data = [run.data for run in runs]
        has_figures = any(each.memory or each.sparsity or each.kernels or each.gpus for each in data)
        if has_figures or any(has_method_figures(run) for run in runs):
            self.widget.layout.display = None
        if self.widget.selected_index == 0:
            self.draw()

    def _on_toggle(self, change: Any) -> None:
        """Draw the figures when the accordion is opened, unless they are up to date."""
        if change["new"] == 0 and self._stale:
            self.draw()

    def draw(self) -> None:
        """Draw the figures of the runs that have ended."""
        self._stale = False
        pictures = method_figures([run for run in self._all_runs() if run.data.done])
        pictures += sparsity_figures([run for run in self._latest_runs() if run.data.done])
        pictures += precision_figures([run for run in self._all_runs() if run.data.done])
        pictures += detail_figures([run for run in self._latest_runs() if run.data.done])
        pictures += gpu_figures([run for run in self._latest_runs() if run.data.done])
        self.output.outputs = tuple(output for picture in pictures for output in _outputs(picture))


def _outputs(picture: Picture) -> list[dict[str, Any]]:
    """Return the outputs of a figure and its table as `display` would produce them, which a thread may not call."""
    figure = static.bundle(picture)
    figure.pop("text/html")  # the table is a separate output below the figure
    table = {"text/html": static.details(picture), "text/plain": ""}
    return [{"output_type": "display_data", "data": data, "metadata": {}} for data in (figure, table)]
