"""labkit: a laboratory for parallel training of neural networks that lives in notebooks.

    import labkit
    experiment = labkit.recipe("vision-ddp").replace("layout.dp_replicate=2")
    run = labkit.run(experiment)          # starts real processes, returns at once
    run.wait().summary()
    labkit.Lab(experiment)                # the same with widgets

Everything is imported when it is first used, and nothing here imports torch: a form draws at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.experiment import Experiment, ExperimentError, Layout, Machine, Problem
    from labkit.experiment.recipes import recipe
    from labkit.launch.client import launch as run
    from labkit.launch.client import warm
    from labkit.launch.sweep import sweep
    from labkit.plots.report import report
    from labkit.proofs.parity import check
    from labkit.runs import Comparison, Run, RunFailed, compare
    from labkit.ui import Lab, show
    from labkit.workloads.custom import from_notebook

__version__ = "0.1.0"

_HOMES = {
    "Comparison": "labkit.runs",
    "Experiment": "labkit.experiment",
    "ExperimentError": "labkit.experiment",
    "Lab": "labkit.ui",
    "Layout": "labkit.experiment",
    "Machine": "labkit.experiment",
    "Problem": "labkit.experiment",
    "Run": "labkit.runs",
    "RunFailed": "labkit.runs",
    "check": "labkit.proofs.parity",
    "compare": "labkit.runs",
    "from_notebook": "labkit.workloads.custom",
    "recipe": "labkit.experiment.recipes",
    "report": "labkit.plots.report",
    "run": "labkit.launch.client:launch",
    "show": "labkit.ui",
    "sweep": "labkit.launch.sweep",
    "warm": "labkit.launch.client",
}

__all__ = [
    "Comparison",
    "Experiment",
    "ExperimentError",
    "Lab",
    "Layout",
    "Machine",
    "Problem",
    "Run",
    "RunFailed",
    "check",
    "compare",
    "from_notebook",
    "recipe",
    "report",
    "run",
    "show",
    "sweep",
    "warm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
