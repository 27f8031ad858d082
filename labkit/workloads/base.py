"""The interface between workloads and ranks. It imports torch: only ranks (and tests) import this file.

A workload's own file (`vision.py`, …) is imported by the form too, so it imports torch inside `build()` only:

    class Vision(WorkloadBase):
        class Options(...): ...                       # the fields next to workload.name
        @classmethod
        def problems(cls, experiment, machine): ...   # its rules
        @classmethod
        def build(cls, options, seed) -> Task: ...    # on the ranks
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Plan = tuple[tuple[str, str], ...]
"""How a module is sharded: pairs of a part of it (the dotted name of a submodule or attribute, or "" for the module
itself) and what is done with that part. A class declares `tp_plan` (styles: labkit.parallel.tensor) and `cp_plan`
(labkit.parallel.context)."""


class Data(Protocol):
    """Samples by index, fetched several at a time."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the samples at `indices`, collated: every tensor has shape [len(indices), …]."""
        ...


class TensorData:
    """Samples in memory: named tensors with the same first dimension."""

    def __init__(self, **tensors: Tensor) -> None:
        lengths = {len(tensor) for tensor in tensors.values()}
        if len(lengths) != 1:
            raise ValueError(f"the tensors of a data set must have the same length, got {sorted(lengths)}")
        self.tensors = tensors
        self.length = lengths.pop()

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices)
        return {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}


class Blocks(nn.Module):
    """A model as a chain of named blocks that the forward pass runs in order, so that it can be split between any two.

    Pipeline stages, per-block costs and sharding all split between blocks, so a block may use the output of its
    predecessor only.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(OrderedDict(blocks))
        self.before_block: Callable[[nn.Module], None] | None = None
        """Called with each block before it runs; set by a layout whose parameters may still be on their way.

        It is no hook of torch's, because those of a compiled block are compiled with it. Copies do not have it.
        """

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            if self.before_block is not None:
                self.before_block(block)
            x = block(x)
        return x

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"before_block": None}


@dataclass(frozen=True)
class Metric:
    """The number by which a workload is judged."""

    key: str
    """Name in the metrics, e.g. `accuracy`."""
    title: str
    """Title of the axis, e.g. `Held-out accuracy`."""
    higher_is_better: bool
    unit: str = ""
    """Unit; `%` shows a fraction as a percentage."""


class Task(Protocol):
    """Data, model, loss and metrics of one workload, ready to train.

    The model is built in float32 on the CPU from the seed; the worker moves it. Everything here must give the same
    numbers on every rank.
    """

    model: nn.Module
    """The model; it takes batch["x"]. The built-in ones are `Blocks`."""
    train: Data
    test: Data
    metric: Metric

    loss_module: nn.Module | None
    """The loss as a module, if it is one: its tensors (class weights) are moved and cast with the run."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of the batch (a scalar).

        The training loop weights it by `batch_weight`, so that the parts of a batch add up to the whole. It must be
        zero, and not NaN, for a batch whose weight is zero.
        """
        ...

    def batch_weight(self, batch: Batch) -> Tensor | float:
        """Return the divisor of the batch's mean loss: the number of samples or of valid targets, or a sum of weights.

        It is proportional to the divisor of `loss`, depends on the batch alone, and is zero for a batch without any
        target that counts.
        """
        ...

    def evaluate(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return sums over the samples of a held-out batch (scalars), always with `count`; ranks' sums are added."""
        ...

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics from the total sums: always `loss`, and the key of `metric`."""
        ...

    def closed_loop(self, model: nn.Module, rank: int, world_size: int, seed: int) -> dict[str, float]:
        """Return this rank's sums of a test beyond the held-out data, such as driving in the simulator; {} for none.

        Called once at the end of training; the sums over all ranks are passed to `metrics` with those of the last
        evaluation.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """Return facts next to the metrics, as JSON, such as classes, majority share or unigram entropy."""
        ...


class ClassificationTask:
    """Cross-entropy over classes; the metric is the fraction of correct predictions."""

    def __init__(self, model: nn.Module, train: Data, test: Data, **facts: Any) -> None:
        self.model, self.train, self.test = model, train, test
        self.metric = Metric("accuracy", "Held-out accuracy", True, "%")
        self.loss_module: nn.Module | None = None
        self._facts = facts

    def batch_weight(self, batch: Batch) -> Tensor | float:
        return float(len(batch["y"]))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(output, batch["y"])

    def evaluate(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        target = batch["y"]
        return {
            "count": output.new_tensor(len(target)),
            "loss": nn.functional.cross_entropy(output, target, reduction="sum"),
            "correct": (output.argmax(-1) == target).sum(),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["count"], "accuracy": sums["correct"] / sums["count"]}

    def closed_loop(self, model: nn.Module, rank: int, world_size: int, seed: int) -> dict[str, float]:
        return {}

    def facts(self) -> dict[str, Any]:
        return self._facts
