"""Your own model, data and loss: a function in a file, in a module, or in a notebook cell.

The function is called on every rank and returns either a `Task` (see `base.py`) or the short form

    def make_task():
        import torch
        from torch import nn
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        x = torch.randn(1000, 8)
        y = (x.sum(1) > 0).long()
        return {
            "model": model,                      # takes x
            "train": (x[:800], y[:800]),         # (x, y) tensors, a torch Dataset of (x, y), or a Data
            "test": (x[800:], y[800:]),          # held out
            "loss_fn": nn.CrossEntropyLoss(),    # loss_fn(output, y): the mean over the samples
            "metric": "accuracy",                # or "loss"; may be left out
        }

or the same as a tuple (model, train, test, loss_fn). Random numbers inside start from the experiment's seed; a
parameter named `seed` receives it. Nothing of it is run while the experiment is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.cell_source import NotSelfContainedError, check, self_contained_source
from labkit.experiment.own_code import method_from_cell
from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options
from labkit.workloads.network import Network

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment
    from labkit.workloads.base import Task

__all__ = ["Custom", "CustomOptions", "NotSelfContainedError", "from_notebook", "self_contained_source"]


class CustomOptions(Options):
    """Where the function that makes the task is defined."""

    path: str = Field(default="", max_length=1000)
    """The function as module:function or file.py:function."""
    source: str = Field(default="", max_length=1_000_000)
    """The function's source text, e.g. of a notebook cell (instead of a path)."""
    factory: str = Field(default="make_task", pattern=r"^[^\W\d]\w*$", max_length=200)
    """Name of the function in the source text."""


class Custom:
    """Your own workload; the metric is accuracy for classes, else the loss, or what your Task defines."""

    Options = CustomOptions

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        options = CustomOptions(**experiment.workload.options)
        if bool(options.path) == bool(options.source):
            yield Problem(
                "workload.path",
                "your own workload needs either a path like file.py:make_task or the source of a notebook cell",
                "file.py:make_task" if not options.path else None,
            )
        elif options.path:
            from labkit.experiment.locate import why_not

            reason = why_not(options.path)
            if reason:
                yield Problem("workload.path", reason)
        else:
            try:
                check(options.source, options.factory)
            except NotSelfContainedError as error:
                yield Problem("workload.source", str(error))

    @staticmethod
    def carries(options: CustomOptions) -> str:
        """Describe whose code runs on the ranks: that of a source text in the experiment, or of a file or module."""
        if options.source:
            lines = len(options.source.splitlines())
            return f"the function {options.factory} in {lines} lines of source text that its experiment carries"
        return f"the function at {options.path}"

    @staticmethod
    def code_of(options: CustomOptions) -> str:
        """Return the SHA-256 of the file that defines the function; empty if there is none, or it cannot be read."""
        from hashlib import sha256

        from labkit.experiment.locate import file_of

        file = file_of(options.path) if options.path else None
        try:
            return sha256(file.read_bytes()).hexdigest() if file is not None else ""
        except OSError:
            return ""

    @classmethod
    def describe(cls, options: CustomOptions) -> Network:
        """Return what layouts need to know of the network: only the ranks build it."""
        return Network(has_plans=False)

    @classmethod
    def build(cls, options: Any, seed: int) -> Task:
        """Call the function and return its task. `options` is a CustomOptions, a dict of its fields, or a section."""
        from labkit.experiment.cell_source import load_source
        from labkit.experiment.locate import load
        from labkit.workloads.custom_task import as_task, call
        from labkit.workloads.options import read

        options = read(CustomOptions, options)
        factory = load(options.path) if options.path else load_source(options.source, options.factory)
        return as_task(call(factory, seed), factory.__name__)


def from_notebook(definition: Callable[..., Any]) -> Any:
    """Let an experiment use what a notebook cell defines: a function that makes a task, or the class of a method.

    Returns the section of the experiment that names it. A function becomes the workload; a subclass of `Compressor`,
    `UpdateRule` or `Sparsifier` becomes a method, which forms list from now on (of a number format and of a pipeline
    schedule, the key is returned). Raises NotSelfContainedError (a ValueError) or TypeError with the reason if that is
    impossible.

    >>> experiment.replace(workload=from_notebook(make_task))                     # doctest: +SKIP
    >>> experiment.set({"gradients.compression": from_notebook(MyCompressor)})    # doctest: +SKIP
    """
    if isinstance(definition, type):
        return method_from_cell(definition)
    return {"name": "custom", "source": self_contained_source(definition), "factory": definition.__name__}
