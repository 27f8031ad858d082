"""The return value of a user's function as a Task; every mismatch is named in one sentence."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.workloads.accuracy import correct_and_counted
from labkit.workloads.base import Batch, Data, Metric, Task
from labkit.workloads.samples import as_data, describe_type
from labkit.workloads.seed import seeded
from labkit.workloads.trial import try_out
from labkit.workloads.weights import as_module, batch_weight, mean_loss, trainable_parameters

_TASK = ("model", "train", "test", "metric", "loss", "evaluate", "metrics", "closed_loop", "facts")
_FORM = "a Task, a dict with model, train, test and loss_fn, or a tuple (model, train, test, loss_fn)"


class SimpleTask:
    """Model, data and a loss function of (output, y).

    `weight_fn` of y is the divisor of the mean loss, if that is not the number of samples and the loss is not one of
    torch's own. The loss is computed in at least float32.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Data,
        test: Data,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        metric: str,
        weight_fn: Callable[[Tensor], Tensor | float] | None = None,
    ) -> None:
        self.model, self.train, self.test, self.weight_fn = model, train, test, weight_fn
        self.loss_fn = as_module(loss_fn)
        self.loss_module: nn.Module | None = self.loss_fn if isinstance(self.loss_fn, nn.Module) else None
        self.measures_accuracy = metric == "accuracy"
        self.metric = (
            Metric("accuracy", "Held-out accuracy", True, "%")
            if self.measures_accuracy
            else Metric("loss", "Held-out loss", False)
        )
        self.extra_facts: dict[str, Any] = {}
        """Additional facts."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        output, target = self._in_common_dtype(output, batch["y"])
        if self.weight_fn is not None and not float(self.weight_fn(batch["y"])):
            return output.flatten()[:0].sum()
        return mean_loss(self.loss_fn, output, target)

    def batch_weight(self, batch: Batch) -> Tensor | float:
        """Return `weight_fn(y)`, or the divisor of torch's own loss, or the number of samples."""
        return batch_weight(self.loss_fn, batch["y"]) if self.weight_fn is None else self.weight_fn(batch["y"])

    def _in_common_dtype(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and target in the wider dtype of output (at least float32) and loss, and cast the loss to it.

        A target is never cast to a lower precision with the network: years in bfloat16 would be rounded to multiples of
        eight.
        """
        if not output.is_floating_point():
            return output, target
        floating = [tensor for tensor in _tensors(self.loss_fn) if tensor.is_floating_point()]
        dtypes = [tensor.dtype for tensor in floating]
        dtype = functools.reduce(torch.promote_types, dtypes, torch.promote_types(output.dtype, torch.float32))
        if any(tensor.dtype != dtype or tensor.device != output.device for tensor in floating):
            self.loss_fn.to(output.device, dtype)
        return output.to(dtype), target.to(dtype) if target.is_floating_point() else target

    def evaluate(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        output, target = self._in_common_dtype(output, batch["y"])
        weight = torch.as_tensor(self.batch_weight(batch), device=output.device)
        sums = {
            "count": output.new_tensor(len(target)),
            "weight": weight,
            "loss": self.loss(output, batch) * weight,
        }
        if self.measures_accuracy:
            sums["correct"], sums["targets"] = correct_and_counted(self.loss_fn, output, target)
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        metrics = {"loss": sums["loss"] / sums["weight"] if sums["weight"] else math.nan}
        if self.measures_accuracy:
            metrics["accuracy"] = sums["correct"] / sums["targets"] if sums["targets"] else math.nan
        return metrics

    def closed_loop(self, model: nn.Module, rank: int, world_size: int, seed: int) -> dict[str, float]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {"train_samples": len(self.train), "test_samples": len(self.test)} | self.extra_facts


def _tensors(loss_fn: Any) -> list[Tensor]:
    """Return the buffers and parameters of the loss, if it is a module."""
    return [*loss_fn.buffers(), *loss_fn.parameters()] if isinstance(loss_fn, nn.Module) else []


def call(factory: Callable[..., Any], seed: int) -> Any:
    """Call the user's function with random generators seeded with `seed`."""
    parameters = inspect.signature(factory).parameters
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if any(name != "seed" for name in needed):
        raise ValueError(f"{factory.__name__} may have a parameter seed and others with defaults, but needs {needed}")
    with seeded(seed):
        return factory(seed=seed) if "seed" in parameters else factory()


def as_task(returned: Any, name: str) -> Task:
    """Return the Task in what `name` returned; ValueError says what is wrong with it."""
    if all(hasattr(returned, attribute) for attribute in _TASK):
        return _completed(returned, name)
    if isinstance(returned, tuple) and len(returned) == 4:
        returned = dict(zip(("model", "train", "test", "loss_fn"), returned, strict=True))
    if not isinstance(returned, dict):
        lacking = [attribute for attribute in _TASK if not hasattr(returned, attribute)]
        close = f"; as a Task it lacks {', '.join(lacking)}" if len(lacking) < len(_TASK) - 1 else ""
        raise ValueError(f"{name} must return {_FORM}, but it returned {describe_type(returned)}{close}")
    missing = [key for key in ("model", "train", "test", "loss_fn") if key not in returned]
    unknown = sorted(set(returned) - {"model", "train", "test", "loss_fn", "metric", "batch_weight"}, key=str)
    if missing or unknown:
        fault = f"lacks {', '.join(missing)}" if missing else f"has unknown keys {', '.join(map(str, unknown))}"
        raise ValueError(f"what {name} returned {fault}; it must be {_FORM}")
    model, loss_fn = returned["model"], returned["loss_fn"]
    for part, value in (("model", model), ("loss_fn", loss_fn)):
        if isinstance(value, type):
            raise ValueError(
                f"{part} from {name} is the class {value.__name__}: give an instance of it, {value.__name__}()"
            )
    if not isinstance(model, nn.Module):
        raise ValueError(f"model from {name} must be a torch.nn.Module, but it is {describe_type(model)}")
    if not callable(loss_fn):
        raise ValueError(f"loss_fn from {name} must be a function of (output, y), but it is {describe_type(loss_fn)}")
    loss_fn = as_module(loss_fn)
    if getattr(loss_fn, "reduction", "mean") not in ("mean", "batchmean"):
        raise ValueError(
            f"loss_fn from {name} must be the mean over the samples, but its reduction is {loss_fn.reduction!r}"
        )
    _refuse_trainable(loss_fn, name)
    weight_fn = returned.get("batch_weight")
    if weight_fn is not None and not callable(weight_fn):
        raise ValueError(f"batch_weight from {name} must be a function of y, but it is {describe_type(weight_fn)}")
    train, test = as_data(returned["train"], f"train from {name}"), as_data(returned["test"], f"test from {name}")
    metric = returned.get("metric") or _guess_metric(loss_fn, test)
    if metric not in ("accuracy", "loss"):
        raise ValueError(f"metric from {name} must be 'accuracy' or 'loss', but it is {metric!r}")
    task = SimpleTask(model, train, test, loss_fn, metric, weight_fn)
    try_out(task, name)
    return task


def _completed(task: Any, name: str) -> Task:
    """Return a user's own Task with the optional parts filled in.

    Batches are weighted by their number of samples, and its loss may be a module. A Task without room for these (slots)
    is refused.
    """
    parts = [getattr(task, attribute, None) for attribute in ("loss_module", "loss", "loss_fn")]
    module = next((part for part in parts if isinstance(part, nn.Module)), None)
    _refuse_trainable(module, name)
    for attribute, value in (("batch_weight", _samples), ("loss_module", module)):
        if not hasattr(task, attribute):
            try:
                object.__setattr__(task, attribute, value)
            except AttributeError:
                raise ValueError(f"the Task from {name} lacks {attribute} and has no room for it") from None
    complete: Task = task
    return complete


def _samples(batch: Batch) -> float:
    """Return the number of samples in a batch."""
    return float(len(next(iter(batch.values()))))


def _refuse_trainable(loss_fn: Any, name: str) -> None:
    """Raise ValueError if the loss has parameters that would have to be trained."""
    names = trainable_parameters(loss_fn)
    if names:
        raise ValueError(
            f"the loss from {name} has parameters of its own ({', '.join(names[:5])}), which no optimizer would train: "
            "put them into the model, or freeze them with requires_grad_(False)"
        )


def _guess_metric(loss_fn: Any, test: Data) -> str:
    """Return "accuracy" for cross-entropy on class indices, else "loss"."""
    y = test.__getitems__([0])["y"]
    classes = y.dim() == 1 and not y.is_floating_point()
    crossed = isinstance(loss_fn, nn.CrossEntropyLoss) or loss_fn is nn.functional.cross_entropy
    return "accuracy" if classes and crossed else "loss"
