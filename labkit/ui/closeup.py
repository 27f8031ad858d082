"""A fold under the live picture: methods, numbers, memory, traffic, pipeline, experts of the runs that have ended.

It costs nothing while a run goes on: pictures are made when somebody opens it, or when a run ends while it is open.
They are static outputs, not FigureWidgets, because each of those sends plotly's five megabytes to the browser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from labkit.plots import static
from labkit.plots.closeup import closeups, combines, combining, computing, sparse
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun

TITLE = "Looked at closely: methods by time and bytes, sparse and narrow numbers, memory, traffic, pipeline, experts"


class Closeup:
    """The fold. `offer()` tells that runs have ended; when pictures are made, `every` gives all runs, for those that
    compare methods, and `latest` those of the live picture, for the update that each of them traced.
    """

    def __init__(self, every: Callable[[], Sequence[LabeledRun]], latest: Callable[[], Sequence[LabeledRun]]) -> None:
        self._every, self._latest = every, latest
        self._stale = True
        self.output = widgets.Output()
        self.widget = widgets.Accordion([self.output], titles=[TITLE], selected_index=None, layout={"display": "none"})
        self.widget.observe(self._opened, "selected_index")

    def offer(self) -> None:
        """A run has ended: show the fold, and draw anew if it is open."""
        self._stale = True
        if any(one.data.memory or one.data.sparsity or one.data.kernels or combines(one) for one in self._every()):
            self.widget.layout.display = None
        if self.widget.selected_index == 0:
            self.draw()

    def _opened(self, change: Any) -> None:
        if change["new"] == 0 and self._stale:
            self.draw()

    def draw(self) -> None:
        """Make the pictures of the runs that have ended."""
        self._stale = False
        pictures = combining([one for one in self._every() if one.data.done])
        pictures += sparse([one for one in self._latest() if one.data.done])
        pictures += computing([one for one in self._every() if one.data.done])
        pictures += closeups([one for one in self._latest() if one.data.done])
        self.output.outputs = tuple(output for picture in pictures for output in _outputs(picture))


def _outputs(picture: Picture) -> list[dict[str, Any]]:
    """The figure and its table, as `display` would leave them; a thread may not call that."""
    figure = static.bundle(picture)
    figure.pop("text/html")  # the table comes as an output of its own, below the figure
    table = {"text/html": static.details(picture), "text/plain": ""}
    return [{"output_type": "display_data", "data": data, "metadata": {}} for data in (figure, table)]
