"""The layout of the lab on the page: form, buttons and problems on the left, the dashboard on the right."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from labkit.experiment import Experiment, ExperimentError, Machine, topology
from labkit.experiment.placement import Placement, placement_of
from labkit.plots import theme
from labkit.plots.grid import grid_html
from labkit.ui.dashboard import Dashboard
from labkit.ui.form import ExperimentForm

if TYPE_CHECKING:
    from labkit.ui.lab import Lab

MAX_PROBLEMS = 6
CEILING_TOOLTIP = "Train independent copies on the same number of ranks: the upper limit of throughput on this machine"

_STYLE = f"""<style>
.labkit-lab {{ --labkit-font: {theme.FONT}; }}
.labkit-lab .widget-label, .labkit-lab input, .labkit-lab select, .labkit-lab button, .labkit-lab .widget-html-content
  {{ font-family: var(--labkit-font); }}
.labkit-left {{ border: 1px solid var(--jp-border-color2, #d9dee4); border-radius: 8px; padding: 10px 12px 12px; }}
.labkit-left .widget-label {{ text-align: left; color: var(--jp-ui-font-color1, #1f2933); }}
.labkit-left .jupyter-button {{ border-radius: 6px; font-weight: 600; }}
.labkit-left .jupyter-button:focus-visible, .labkit-left input:focus-visible, .labkit-left select:focus-visible
  {{ outline: 3px solid #E69F00; outline-offset: 1px; }}
.labkit-left .labkit-fold {{ text-align: left; background: none; padding-left: 0; }}
.labkit-left .labkit-advanced {{ border-left: 2px solid var(--jp-border-color2, #d9dee4); }}
.labkit-run {{ background: #0072B2; color: #ffffff; }}
.labkit-run[disabled] {{ background: #9aa5b1; opacity: 1; }}
.labkit-heading {{ font: 600 15px/1.4 var(--labkit-font); margin: 0; }}
.labkit-state {{ font: 600 14px/1.5 var(--labkit-font); }}
.labkit-scroll {{ max-height: 260px; overflow: auto; font-size: 13px; line-height: 1.5; }}
.labkit-note {{ font-size: 13px; line-height: 1.4; overflow-wrap: anywhere; white-space: normal; }}
.labkit-bad {{ border-left: 4px solid #D55E00; padding-left: 8px; }}
.labkit-warn {{ border-left: 4px solid #E69F00; padding-left: 8px; }}
.labkit-left .widget-textarea textarea {{ font-family: var(--jp-code-font-family, monospace); font-size: 12px; }}
/* A live lab shows everything itself; the record below it is for the notebook without a kernel. */
.jp-OutputArea-child:has(.labkit-lab) ~ .jp-OutputArea-child:has(.js-plotly-plot) {{ display: none; }}
</style>"""


class Panel:
    """The widgets of a live lab."""

    def __init__(self, experiment: Experiment, knobs: Sequence[str] | None, lab: Lab, height: int) -> None:
        self.lab = lab
        self.form = ExperimentForm(experiment, knobs)
        self.dashboard = Dashboard(height, on_end=self._on_run_end)
        self.grid = widgets.HTML()
        self.problems = widgets.VBox()
        self.code = widgets.Textarea(
            description="Code",
            layout={"width": "auto", "height": "260px", "display": "none"},
            tooltip="Code of a cell that runs the same experiment",
        )
        self.code.style.description_width = "0px"
        self.run_button = self._button("Run", "Launch the experiment", lab.run, "labkit-run")
        self.stop_button = self._button("Stop", "Finish the step, write a checkpoint and end", lab.stop)
        self.baseline_button = self._button("Run baseline", "Launch the same experiment on one rank", lab.baseline)
        self.ceiling_button = self._button("Measure ceiling", CEILING_TOOLTIP, lab.measure_ceiling)
        self.code_button = self._button(
            "Show code", "Show the code of a cell that does the same without widgets", self.toggle_code
        )
        self._displayed_problems: tuple[Any, ...] = ()
        self.widget = self._arrange()
        self.form.on_change(self.refresh)
        self.refresh()

    def _button(self, text: str, tooltip: str, action: Callable[[], Any], style: str = "") -> Any:
        """Return a button that calls `action` and shows its errors in the dashboard."""
        button = widgets.Button(description=text, tooltip=tooltip, layout={"width": "auto", "flex": "1 1 auto"})
        if style:
            button.add_class(style)

        def handle_click(_button: Any) -> None:
            try:
                self.dashboard.notice = ""
                action()
            except (ExperimentError, OSError, RuntimeError, ValueError) as error:
                self.dashboard.say(f"Not launched: {theme.plain(error, 300)}")
            self.refresh_buttons()

        button.on_click(handle_click)
        return button

    def _arrange(self) -> Any:
        """Return the widget with the form on the left and the dashboard on the right."""
        row = {"display": "flex", "flex_flow": "row wrap", "width": "100%"}
        left = widgets.VBox(
            [
                widgets.HTML(_STYLE + '<p class="labkit-heading" role="heading" aria-level="2">Experiment</p>'),
                self.form.widget,
                self.problems,
                widgets.HBox([self.run_button, self.stop_button], layout=row),
                widgets.HBox([self.baseline_button, self.ceiling_button], layout=row),
                widgets.HBox([self.code_button], layout=row),
                self.code,
            ],
            layout={"width": "350px", "flex": "0 0 350px", "height": "max-content"},
        )
        left.add_class("labkit-left")
        right = widgets.VBox(
            [self.dashboard.state, self.dashboard.progress, self.grid, self.dashboard.widget],
            layout={"flex": "1 1 620px", "min_width": "0", "padding": "0 0 0 14px"},
        )
        columns = widgets.HBox([left, right], layout={"display": "flex", "flex_flow": "row nowrap", "width": "100%"})
        columns.add_class("labkit-lab")
        return columns

    # -- updates ----------------------------------------------------------------------------------------------------

    def watch(self, run: Any) -> None:
        """Show a run, and keep the buttons up to date."""
        self.dashboard.watch(run)
        self.refresh_buttons()

    def _on_run_end(self) -> None:
        """Enable the buttons and update the record after a run has ended."""
        self.refresh_buttons()
        self.lab.update_record()

    def refresh(self) -> None:
        """Update problems, rank grid, code and buttons after a change of the form."""
        self._show_problems()
        if not self.form.problems:
            experiment = self.form.value
            layout = experiment.resolve().layout
            grid = grid_html(layout, experiment.training.global_batch, experiment, self._placement(experiment))
            if self.grid.value != grid:
                self.grid.value = grid
            if self.code.layout.display != "none":
                self.code.value = self.lab.code()
        self.refresh_buttons()

    def _placement(self, experiment: Experiment) -> Placement | None:
        """Return the GPUs of the ranks; None on the CPU, and until a thread knows how the GPUs are linked."""
        machine = Machine.here()
        if machine.device(experiment.launch.device) != "cuda" or len(machine.gpus) < 2:
            return None
        return placement_of(machine.gpu_numbers, topology.when_known(self.refresh))

    def refresh_buttons(self) -> None:
        """Enable the launch buttons if the experiment has no problems and no other run of this lab is in progress."""
        active = self.dashboard.active
        reason = ""
        if self.form.problems:
            reason = f"Cannot run: {theme.plain(self.form.problems[0], 200)}"
        elif active is not None:
            reason = "A run is in progress; a second one would slow both down"
        for button, tooltip in (
            (self.run_button, "Launch the experiment"),
            (self.baseline_button, "Launch the same experiment on one rank"),
            (self.ceiling_button, CEILING_TOOLTIP),
        ):
            button.disabled, button.tooltip = bool(reason), reason or tooltip
        self.stop_button.disabled = active is None
        self.code_button.disabled = bool(self.form.problems)

    def _show_problems(self) -> None:
        """Show the problems and the warnings of the experiment."""
        problems = (*self.form.problems, None, *self.form.warnings)
        if problems == self._displayed_problems:
            return
        self._displayed_problems = problems
        rows = [self._problem(problem) for problem in self.form.problems[:MAX_PROBLEMS]]
        more = len(self.form.problems) - MAX_PROBLEMS
        if more > 0:
            rows.append(_note(f"and {more} more", "labkit-bad"))
        rows += [
            _note(f"Note: {theme.plain(warning, 400)}", "labkit-warn") for warning in self.form.warnings[:MAX_PROBLEMS]
        ]
        self.problems.children = rows

    def _problem(self, problem: Any) -> Any:
        """Return a note with the reason, and a button that applies the hint if there is one."""
        prefix = f"{problem.field}: " if problem.field else ""
        note = _note(f"{prefix}{problem.reason}.", "labkit-bad")
        if self.form.hint_field(problem) is None:
            return note
        hint = widgets.Button(
            description=f"Use {theme.plain(problem.nearest, 30)}",
            tooltip=f"Set {self.form.hint_field(problem)} to {theme.plain(problem.nearest, 60)}",
            layout={"width": "auto", "height": "26px"},
        )
        hint.on_click(lambda _button: self.form.apply_hint(problem))
        return widgets.VBox([note, hint])

    def toggle_code(self) -> None:
        """Show or hide the code of a cell that does the same without widgets."""
        hidden = self.code.layout.display == "none"
        self.code.layout.display = "" if hidden else "none"
        self.code_button.description = "Hide code" if hidden else "Show code"
        if hidden:
            self.code.value = self.lab.code()


def _note(sentence: str, style: str) -> Any:
    """Return a widget with a sentence, in the given CSS class."""
    return widgets.HTML(f'<div class="labkit-note {style}">{html.escape(theme.plain(sentence, 500))}</div>')
