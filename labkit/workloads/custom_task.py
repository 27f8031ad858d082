"""What a user's function returned, as a Task; every misfit is named in one sentence."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.workloads.accuracy import right_and_counted
from labkit.workloads.base import Batch, Data, Metric, Task, TensorData
from labkit.workloads.samples import checked
from labkit.workloads.seed import seeded
from labkit.workloads.weights import as_module, batch_weight, mean_loss, trainable

_TASK = ("model", "train", "test", "metric", "loss", "evaluate", "metrics", "closed_loop", "facts")
_FORM = "a Task, a dict with model, train, test and loss_fn, or a tuple (model, train, test, loss_fn)"


class PairData:
    """A torch Dataset of pairs (x, y) as `Data`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        from torch.utils.data import default_collate

        x, y = default_collate([self.dataset[index] for index in indices])
        return {"x": x, "y": y}


class SimpleTask:
    """Model, data and a loss function of (output, y).

    `weight_fn` of y says what the mean loss is a mean over, where that is not the number of samples and the loss is not
    torch's own. The loss is computed at least in float32, in the widest format of output, target and loss module.
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
        self.counts_right = metric == "accuracy"
        self.metric = (
            Metric("accuracy", "Held-out accuracy", True, "%")
            if self.counts_right
            else Metric("loss", "Held-out loss", False)
        )
        self.notes: dict[str, Any] = {}
        """More facts."""

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        output, target = self._alike(output, batch["y"])
        if self.weight_fn is not None and not float(self.weight_fn(batch["y"])):
            return output.flatten()[:0].sum()
        return mean_loss(self.loss_fn, output, target)

    def batch_weight(self, batch: Batch) -> Tensor | float:
        """By `weight_fn`, or the divisor of torch's own loss, or the number of samples."""
        return batch_weight(self.loss_fn, batch["y"]) if self.weight_fn is None else self.weight_fn(batch["y"])

    def _alike(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Output and target in the widest of their formats, and the tensors of the loss moved to it."""
        if not isinstance(output, Tensor):
            raise ValueError(f"the model must give one tensor, it gives {_kind(output)}; return the scores alone")
        if not output.is_floating_point():
            return output, target
        held = [tensor for tensor in _tensors(self.loss_fn) if tensor.is_floating_point()]
        formats = [tensor.dtype for tensor in (target, *held) if tensor.is_floating_point()]
        wide = functools.reduce(torch.promote_types, formats, torch.promote_types(output.dtype, torch.float32))
        if any(tensor.dtype != wide or tensor.device != output.device for tensor in held):
            self.loss_fn.to(output.device, wide)
        return output.to(wide), target.to(wide) if target.is_floating_point() else target

    def evaluate(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        output, target = self._alike(output, batch["y"])
        weight = torch.as_tensor(self.batch_weight(batch), device=output.device)
        sums = {
            "count": output.new_tensor(len(target)),
            "weight": weight,
            "loss": self.loss(output, batch) * weight,
        }
        if self.counts_right:
            sums["correct"], sums["targets"] = right_and_counted(self.loss_fn, output, target)
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        metrics = {"loss": sums["loss"] / sums["weight"] if sums["weight"] else math.nan}
        if self.counts_right:
            metrics["accuracy"] = sums["correct"] / sums["targets"] if sums["targets"] else math.nan
        return metrics

    def closed_loop(self, model: nn.Module, rank: int, world_size: int, seed: int) -> dict[str, float]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {"train_samples": len(self.train), "test_samples": len(self.test)} | self.notes


def _tensors(loss_fn: Any) -> list[Tensor]:
    """Buffers and frozen parameters of the loss."""
    return [*loss_fn.buffers(), *loss_fn.parameters()] if isinstance(loss_fn, nn.Module) else []


def call(factory: Callable[..., Any], seed: int) -> Any:
    """Call the user's function; random numbers in it start from `seed`."""
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


def as_task(made: Any, name: str) -> Task:
    """The Task in what `name` returned; raises ValueError with what is wrong about it."""
    if all(hasattr(made, attribute) for attribute in _TASK):
        return _completed(made, name)
    if isinstance(made, tuple) and len(made) == 4:
        made = dict(zip(("model", "train", "test", "loss_fn"), made, strict=True))
    if not isinstance(made, dict):
        lacking = [attribute for attribute in _TASK if not hasattr(made, attribute)]
        close = f"; as a Task it lacks {', '.join(lacking)}" if len(lacking) < len(_TASK) - 1 else ""
        raise ValueError(f"{name} must return {_FORM}, it returned {_kind(made)}{close}")
    missing = [key for key in ("model", "train", "test", "loss_fn") if key not in made]
    unknown = sorted(set(made) - {"model", "train", "test", "loss_fn", "metric", "batch_weight"}, key=str)
    if missing or unknown:
        fault = f"lacks {', '.join(missing)}" if missing else f"has unknown keys {', '.join(map(str, unknown))}"
        raise ValueError(f"what {name} returned {fault}; it must be {_FORM}")
    model, loss_fn = made["model"], made["loss_fn"]
    if not isinstance(model, nn.Module):
        raise ValueError(f"model from {name} must be a torch.nn.Module, it is {_kind(model)}")
    if not callable(loss_fn):
        raise ValueError(f"loss_fn from {name} must be a function of (output, y), it is {_kind(loss_fn)}")
    loss_fn = as_module(loss_fn)
    if getattr(loss_fn, "reduction", "mean") not in ("mean", "batchmean"):
        raise ValueError(
            f"loss_fn from {name} must be the mean over the samples, its reduction is {loss_fn.reduction!r}"
        )
    _refuse_trainable(loss_fn, name)
    weight_fn = made.get("batch_weight")
    if weight_fn is not None and not callable(weight_fn):
        raise ValueError(f"batch_weight from {name} must be a function of y, it is {_kind(weight_fn)}")
    train, test = _data(made["train"], f"train from {name}"), _data(made["test"], f"test from {name}")
    metric = made.get("metric") or _guess_metric(loss_fn, test)
    if metric not in ("accuracy", "loss"):
        raise ValueError(f"metric from {name} must be 'accuracy' or 'loss', it is {metric!r}")
    return SimpleTask(model, train, test, loss_fn, metric, weight_fn)


def _completed(task: Any, name: str) -> Task:
    """A user's own Task with what it may leave out: batches are weighed by their samples, and its loss may be a module.

    A Task without room for these (slots) is refused.
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
    """The number of samples in a batch."""
    return float(len(next(iter(batch.values()))))


def _refuse_trainable(loss_fn: Any, name: str) -> None:
    names = trainable(loss_fn)
    if names:
        raise ValueError(
            f"the loss from {name} has parameters of its own ({', '.join(names[:5])}), which no optimizer would train: "
            "put them into the model, or freeze them with requires_grad_(False)"
        )


def _data(given: Any, what: str) -> Data:
    """(x, y) tensors, a torch Dataset of pairs, or a Data."""
    if type(given).__module__.partition(".")[0] == "datasets":
        raise ValueError(
            f"{what} is a datasets.{_kind(given)}, whose rows are dicts: wrap it in a torch Dataset that returns "
            "pairs (x, y)"
        )
    if isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        x, y = given
        if len(x) != len(y):
            raise ValueError(f"{what} has {len(x)} inputs and {len(y)} targets")
        data: Data = TensorData(x=x, y=y)
    elif isinstance(given, torch.utils.data.IterableDataset):
        raise ValueError(f"{what} is an iterable data set; samples must be found by their index, in any order")
    elif isinstance(given, torch.utils.data.Dataset):
        data = _dataset(given, what)
    elif hasattr(given, "__getitems__") and hasattr(given, "__len__"):
        data = given
    else:
        raise ValueError(f"{what} must be (x, y) tensors, a torch Dataset or a Data, it is {_kind(given)}")
    if not len(data):
        raise ValueError(f"{what} is empty")
    return data


def _dataset(given: Any, what: str) -> Data:
    if not hasattr(given, "__len__"):
        raise ValueError(f"{what} has no length (__len__)")
    if len(given) and not (isinstance(given[0], tuple | list) and len(given[0]) == 2):
        raise ValueError(f"{what} must give pairs (x, y), its first sample is {_kind(given[0])}")
    return PairData(given)


def _guess_metric(loss_fn: Any, test: Data) -> str:
    try:
        y: Any = checked(test, [0], "test")["y"]
    except KeyError:
        return "loss"
    classes = y.dim() == 1 and not y.is_floating_point()
    crossed = isinstance(loss_fn, nn.CrossEntropyLoss) or loss_fn is nn.functional.cross_entropy
    return "accuracy" if classes and crossed else "loss"


def _kind(value: Any) -> str:
    return f"{type(value).__name__}" if value is not None else "None"
