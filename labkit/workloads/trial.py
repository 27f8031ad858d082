"""A trial of a user's task on two samples when it is built: dtypes are fitted, and what cannot work is named.

Failures inside the model itself are left to the rehearsal, which has the device, the layout and both modes.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from labkit.workloads.accuracy import correct_and_counted
from labkit.workloads.base import Batch, Data, TensorData
from labkit.workloads.causal import refuse_leak
from labkit.workloads.restore import undisturbed
from labkit.workloads.samples import Cast, describe_type
from labkit.workloads.weights import is_of_classes, is_of_numbers

if TYPE_CHECKING:
    from labkit.workloads.custom_task import SimpleTask

_BROADCAST = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def try_out(task: SimpleTask, name: str) -> None:
    """Fit the dtypes of inputs and targets to model and loss; raise ValueError in a sentence for a mismatch."""
    _fit_targets(task)
    if any(is_lazy(tensor) for tensor in (*task.model.parameters(), *task.model.buffers())):
        return  # a pass would fix their shapes: the rehearsal refuses them
    with (
        undisturbed(task.model, task.train, task.test, task.loss_fn, weights=False),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # they are repeated in training, where they belong
        task.model.eval()
        batch, output = _fit_inputs(task)
        if output is None:
            return
        _refuse_parts(output, "eval", name)
        _try_loss(task, output, batch, name)
        if task.measures_accuracy:
            try:
                correct_and_counted(task.loss_fn, output, batch["y"])
            except ValueError as error:
                raise ValueError(f"metric from {name}: {error}") from None
    _check_classes(task, output, name)
    _check_causal(task, output, batch, name)
    _try_training(task, name)


def _try_training(task: SimpleTask, name: str) -> None:
    """Refuse a model that returns more than logits in training mode; weights that such a pass changes are restored."""
    indices = list(range(min(2, len(task.train))))
    with undisturbed(task.model, task.train), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = task.train.__getitems__(indices)["x"]
        task.model.train()
        output = _run(task.model, _as_weights(task.model, x))
        if output is not None:
            _refuse_parts(output, "training", name)


def _refuse_parts(output: Any, mode: str, name: str) -> None:
    """Raise ValueError unless the output is a single tensor."""
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model from {name} must give one tensor in {mode} mode, but it gives a {_parts(output)}: "
            "return the logits alone"
        )


def _as_weights(model: nn.Module, x: Tensor) -> Tensor:
    """Return floating-point inputs in the dtype of the model's weights, others unchanged."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return x.to(own) if x.is_floating_point() else x


def _fit_targets(task: SimpleTask) -> None:
    """Cast class indices to int64, and targets of losses of real numbers to float32."""
    target = task.train.__getitems__([0])["y"]
    if target.is_floating_point() or target.is_complex():
        return
    dtype = torch.float32 if is_of_numbers(task.loss_fn) else None if target.dtype == torch.bool else torch.int64
    if dtype is not None and (dtype != target.dtype or task.test.__getitems__([0])["y"].dtype != dtype):
        task.train, task.test = Cast(task.train, None, dtype), Cast(task.test, None, dtype)


def _fit_inputs(task: SimpleTask) -> tuple[Batch, Any]:
    """Return a held-out batch and the model's output for it; None if the model cannot run here.

    Integers that the model refuses are given to it as float32, unscaled, if it accepts those.
    """
    indices = list(range(min(2, len(task.test))))
    batch = task.test.__getitems__(indices)
    x = batch["x"]
    own = next((p.dtype for p in task.model.parameters() if p.is_floating_point()), torch.float32)
    output = _run(task.model, _as_weights(task.model, x))
    if output is None and not (x.is_floating_point() or x.is_complex()):
        output = _run(task.model, x.to(own))
        if output is not None:
            task.extra_facts["inputs"] = f"{str(x.dtype)[6:]}, given to the model as float32 without scaling"
            task.train, task.test = (Cast(data, torch.float32, None) for data in (task.train, task.test))
    return batch, output


def _run(model: nn.Module, x: Tensor) -> Any:
    """Return the model's output, or None if it raises."""
    try:
        return model(x)
    except Exception:  # the user's own code: the rehearsal reports what it raises
        return None


def _try_loss(task: SimpleTask, output: Tensor, batch: Batch, name: str) -> None:
    """Raise ValueError if the loss fails for this output, or if it is not a single number."""
    target = batch["y"]
    shapes = f"outputs {list(output.shape)} and targets {list(target.shape)} of {str(target.dtype)[6:]}"
    if isinstance(task.loss_fn, _BROADCAST) and output.shape != target.shape:
        raise ValueError(f"loss_fn from {name} would broadcast {shapes} to one shape: give both the same shape")
    try:
        loss = task.loss(output, batch)
    except Exception as error:  # the user's own code, or torch's checks of shapes and formats
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"loss_fn from {name} fails for {shapes}: {reason}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else describe_type(loss)
        raise ValueError(f"loss_fn from {name} must give the mean over the samples, one number; it gives {got}")


def _check_classes(task: SimpleTask, output: Tensor, name: str) -> None:
    """Refuse class indices beyond the number of classes, if all targets are in memory."""
    if not is_of_classes(task.loss_fn) or output.dim() < 2:
        return
    classes = output.shape[1]
    for data, part in ((task.train, "train"), (task.test, "test")):
        target = _targets(data)
        if target is None or target.is_floating_point():
            continue
        if bool((target == task.loss_fn.ignore_index).all()):
            raise ValueError(f"every target of {part} from {name} is ignore_index ({task.loss_fn.ignore_index})")
        wrong = (target != task.loss_fn.ignore_index) & ((target < 0) | (target >= classes))
        if bool(wrong.any()):
            first = int(wrong.flatten(1).any(1).nonzero()[0]) if target.dim() > 1 else int(wrong.nonzero()[0])
            value = int(target[wrong][0])
            raise ValueError(
                f"sample {first} of {part} from {name} has the class {value}, but the model gives {classes} classes "
                f"(0 to {classes - 1})"
            )


def _targets(data: Data) -> Tensor | None:
    """Return all targets of data in memory; None for other data."""
    while isinstance(data, Cast):
        data = data.data
    return data.tensors["y"] if isinstance(data, TensorData) else None


def _check_causal(task: SimpleTask, output: Tensor, batch: Batch, name: str) -> None:
    """Refuse a model that sees its targets, if the targets are the inputs shifted by one token."""
    x, y = batch["x"], batch["y"]
    if x.is_floating_point() or x.dim() != 2 or x.shape != y.shape or x.shape[1] < 4 or output.dim() != 3:
        return
    if not torch.equal(x[:, 1:], y[:, :-1]) or bool((x == x[:, :1]).all()):
        return
    first_axes = output.shape[:2] == x.shape
    if not first_axes and (output.shape[0], output.shape[2]) != tuple(x.shape):
        return
    vocabulary = output.shape[2] if first_axes and not (is_of_classes(task.loss_fn)) else output.shape[1]
    highest = int(max(x.max(), y.max())) + 1
    model = task.model if vocabulary == output.shape[2] and first_axes else _ClassesLast(task.model)
    try:
        refuse_leak(
            model, min(highest, vocabulary), x.shape[1], f"the model from {name}", "give its attention a causal mask"
        )
    except (RuntimeError, IndexError, TypeError):
        return  # the rehearsal reports it


class _ClassesLast(nn.Module):
    """A model with logits [N, C, T], transposed to [N, T, C]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x).transpose(1, 2)
        return output


def _parts(output: Any) -> str:
    """Describe an output that is not a tensor."""
    if isinstance(output, dict):
        return f"dict of {', '.join(map(str, output))}"
    return describe_type(output)
