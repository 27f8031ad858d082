"""Samples of a data set; one that cannot be read or collated is named by its index (issue 11, B 16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from labkit.experiment.fault import TaskFault, describe_error
from labkit.workloads.base import Batch, Data


def fetch(data: Data, indices: Sequence[int], what: str) -> Batch:
    """Return the samples at `indices` of the data called `what` (`train`, `test`); TaskFault names a faulty one."""
    try:
        return data.__getitems__(indices)
    except TaskFault:
        raise
    except Exception as error:
        already_named = str(error).startswith(("sample ", "samples "))  # by the data set itself (samples.py)
        raise TaskFault(error if already_named else _culprit(data, indices, what, error)) from error


def fetch_checked(data: Data, indices: Sequence[int], what: str) -> Batch:
    """Return the samples; TaskFault unless they are a dict of tensors with one row per sample and an x."""
    batch = fetch(data, indices, what)
    if not isinstance(batch, dict):
        raise TaskFault(_no_batch(data, batch, what))
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise TaskFault(f"{name} of {what} is {_described(value)}, and {_ADVICE[_family(value)]}")
        if value.layout is not torch.strided:
            raise TaskFault(f"{name} of {what} is a sparse tensor: give it dense ({name}.to_dense())")
        if not value.dim() or len(value) != len(indices):
            raise TaskFault(
                f"{name} of {what} has the shape {list(value.shape)} for {len(indices)} samples: "
                "the first dimension must count the samples"
            )
    if "x" not in batch:
        raise TaskFault(f"a batch of {what} has no x, only {', '.join(map(str, batch))}")
    return batch


_ADVICE = {
    "text": "labels must be numbers: give the classes numbers, e.g. classes.index(label)",
    "dict": "a model gets one tensor: join the parts in the data set and split them in the model",
    "other": "it must become a tensor",
}


def _family(value: Any) -> str:
    """Return the key in _ADVICE for a value that is not a tensor."""
    if isinstance(value, dict):
        return "dict"
    if isinstance(value, list | tuple) and value and isinstance(value[0], str | bytes):
        return "text"
    return "other"


def _described(value: Any) -> str:
    """Describe a value in words."""
    if value is None:
        return "None"
    if isinstance(value, str | bytes):
        return f"text ({value[:20]!r})"
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} and shape {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, list(value)[:4]))}"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {_described(value[0])}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def _no_batch(data: Data, batch: Any, what: str) -> str:
    """Return why what the data returned is not a batch."""
    if type(data).__module__.partition(".")[0] == "datasets":
        return (
            f"{what} is a datasets.Dataset, whose rows are dicts: wrap it in a torch Dataset that returns pairs (x, y) "
            "of one row"
        )
    return f"a batch of {what} is {_described(batch)}: __getitems__ must return a dict of tensors with an x"


def _culprit(data: Data, indices: Sequence[int], what: str, error: Exception) -> str:
    """Return which of these samples cannot be read, or which two cannot be stacked."""
    if len(indices) == 1:  # reading it again might succeed: a sample that fails sometimes is named too
        return _unreadable(data, indices[0], what, error)
    batches: list[tuple[int, Any]] = []
    for index in indices:
        try:
            batches.append((index, data.__getitems__([index])))
        except Exception as own:
            return _unreadable(data, index, what, own)
    for index, batch in batches[1:]:
        first, second = batches[0][1], batch
        if isinstance(first, dict) and isinstance(second, dict):
            for name in first:
                first_value, second_value = first[name], second.get(name)
                both = isinstance(first_value, Tensor)
                if type(first_value) is not type(second_value) or (both and _rest(first_value) != _rest(second_value)):
                    return (
                        f"samples {batches[0][0]} and {index} of {what} cannot be stacked: {name} is "
                        f"{_described_sample(first_value)} in one and {_described_sample(second_value)} in the other"
                    )
    return f"samples {indices[0]} to {indices[-1]} of {what} cannot be read together: {describe_error(error)}"


def _unreadable(data: Data, index: int, what: str, error: Exception) -> str:
    """Return in one sentence why the sample at `index` cannot be read."""
    part = _odd_part(getattr(data, "dataset", None), index)
    return f"sample {index} of {what} " + (part or f"cannot be read: {describe_error(error)}")


def _rest(value: Any) -> list[int]:
    """Return the shape of a sample."""
    return list(value.shape[1:])


def _described_sample(value: Any) -> str:
    """Describe the only element of a batch of one."""
    return _described(value[0]) if isinstance(value, Tensor | list | tuple) and len(value) == 1 else _described(value)


def _odd_part(inner: Any, index: int) -> str | None:
    """Return what is wrong with a pair (x, y) that can be read but not converted to tensors; None if nothing is."""
    try:
        pair = inner[index]
    except Exception:
        return None
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return f"is {_described(pair)}, but must be a pair (x, y)"
    for name, value in zip("xy", pair, strict=True):
        fits = isinstance(value, Tensor | int | float | bool | str | bytes | dict | list | tuple)
        if not fits and type(value).__module__ != "numpy":
            return f"has {_described(value)} for {name}: it must be a tensor or a number"
    return None
