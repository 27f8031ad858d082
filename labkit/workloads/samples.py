"""A user's samples as batches; a sample that does not fit is named by its index (issue 11, B16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.workloads.base import Batch, Data, TensorData

_FORMS = "(x, y) tensors, a torch Dataset of pairs (x, y), or a Data"


class PairData:
    """A torch Dataset of pairs (x, y) as `Data`. `what` names it in messages, as in `train from make_task`."""

    def __init__(self, dataset: Any, what: str = "the data set") -> None:
        self.dataset, self.what = dataset, what

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        pairs = [self._pair(index) for index in indices]
        return {
            "x": self._stacked(indices, [x for x, _ in pairs], "x"),
            "y": self._stacked(indices, [y for _, y in pairs], "y"),
        }

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the sample at `index` as a pair of tensors; ValueError names a sample that cannot be read."""
        try:
            sample = self.dataset[index]
        except Exception as error:  # the user's own code may raise anything; it is chained
            reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
            raise ValueError(f"sample {index} of {self.what} cannot be read: {reason}") from error
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise ValueError(f"sample {index} of {self.what} must be a pair (x, y), but it is {describe_type(sample)}")
        return self._tensor(sample[0], index, "x"), self._tensor(sample[1], index, "y")

    def _tensor(self, value: Any, index: int, name: str) -> Tensor:
        """Return x or y of a sample as a tensor; ValueError names the sample if that is impossible."""
        if isinstance(value, Tensor):
            if value.layout is not torch.strided:
                raise ValueError(f"sample {index} of {self.what}: {sparse(name)}")
            return value
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(
                f"sample {index} of {self.what}: its {name} is {short(value)}, which 64 bits cannot hold: give numbers "
                "from -2**63 to 2**63 - 1, or floating-point numbers"
            )
        if isinstance(value, bool | int | float | complex | np.generic | np.ndarray):
            array = np.asarray(value)
            if array.dtype.kind in "biufc":
                return torch.as_tensor(array)
        raise ValueError(
            f"sample {index} of {self.what}: its {name} must be a tensor, an array or a number, but it is "
            f"{describe_type(value)}" + (f" ({value[:20]!r})" if isinstance(value, str) else "")
        )

    def _stacked(self, indices: Sequence[int], tensors: list[Tensor], name: str) -> Tensor:
        """Stack the tensors in their promoted dtype; ValueError names two samples of different shapes."""
        first = tensors[0]
        for index, tensor in zip(indices, tensors, strict=True):
            if tensor.shape != first.shape:
                raise ValueError(
                    f"samples {indices[0]} and {index} of {self.what} cannot be stacked: their {name} have the shapes "
                    f"{list(first.shape)} and {list(tensor.shape)}; pad or crop them to one shape"
                )
        if len({tensor.dtype for tensor in tensors}) > 1:
            dtype = first.dtype
            for tensor in tensors:
                dtype = torch.promote_types(dtype, tensor.dtype)
            tensors = [tensor.to(dtype) for tensor in tensors]
        return torch.stack(tensors)


class Cast:
    """A `Data` whose inputs and targets are cast to other dtypes; None leaves them as they are."""

    def __init__(self, data: Data, x: torch.dtype | None, y: torch.dtype | None) -> None:
        self.data = data
        self.dtypes = {"x": x, "y": y}

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = self.data.__getitems__(indices)
        return {name: tensor.to(self.dtypes.get(name) or tensor.dtype) for name, tensor in batch.items()}


def as_data(given: Any, what: str) -> Data:
    """Return (x, y) tensors or arrays, a torch Dataset of pairs, or a Data as `Data`.

    Raises ValueError in a sentence that names `what`.
    """
    if (
        isinstance(given, tuple | list)
        and len(given) == 2
        and all(isinstance(part, Tensor | np.ndarray) for part in given)
    ):
        data = _of_tensors(given, what)
    elif isinstance(given, torch.utils.data.IterableDataset):
        raise ValueError(f"{what} is an iterable data set; samples must be accessible by index, in any order")
    elif isinstance(given, torch.utils.data.Dataset):
        data = _of_dataset(given, what)
    elif type(given).__module__.partition(".")[0] == "datasets":
        raise ValueError(
            f"{what} is a {type(given).__name__} of the library datasets, whose samples are dicts; give {_FORMS}: "
            'for example (torch.tensor(data["x"]), torch.tensor(data["y"]))'
        )
    elif hasattr(given, "__getitems__") and hasattr(given, "__len__"):
        data = given
    else:
        raise ValueError(f"{what} must be (x, y) tensors, a torch Dataset or a Data, but it is {describe_type(given)}")
    if not len(data):
        raise ValueError(f"{what} is empty")
    if data is given:
        _check_batch(data, what)
    return data


def _of_tensors(given: Sequence[Any], what: str) -> Data:
    """Return (x, y) tensors or arrays as `Data`."""
    for name, part in zip("xy", given, strict=True):
        if isinstance(part, np.ndarray) and part.dtype.kind not in "biufc":
            raise ValueError(f"{what}: {name} is an array of {part.dtype}, which is not a number")
        if not part.shape:
            raise ValueError(f"{what}: {name} is a single number, but its first axis must be the samples")
        if isinstance(part, Tensor) and part.layout is not torch.strided:
            raise ValueError(f"{what}: {sparse(name)}")
    x, y = (torch.as_tensor(part) for part in given)
    if len(x) != len(y):
        raise ValueError(f"{what} has {len(x)} inputs and {len(y)} targets")
    return TensorData(x=x, y=y)


def _of_dataset(given: Any, what: str) -> Data:
    """Return a torch Dataset of pairs as `Data`."""
    if not hasattr(given, "__len__"):
        raise ValueError(f"{what} has no length (__len__)")
    if len(given) and not (isinstance(first := given[0], tuple | list) and len(first) == 2):
        raise ValueError(f"{what} must give pairs (x, y), but its first sample is {describe_type(first)}")
    return PairData(given, what)


def _check_batch(data: Data, what: str) -> None:
    """Raise ValueError unless a Data gives dicts with the tensors x and y."""
    batch = data.__getitems__([0])
    if not isinstance(batch, dict) or not all(isinstance(batch.get(name), Tensor) for name in "xy"):
        got = f"a dict of {', '.join(map(str, batch))}" if isinstance(batch, dict) else describe_type(batch)
        raise ValueError(
            f"{what} is a Data, whose __getitems__ must give a dict with the tensors x and y, but it gives {got}"
        )


def sparse(name: str) -> str:
    """Return why a sparse tensor cannot be trained on, and what to give instead."""
    return f"{name} is a sparse tensor, which cannot be batched: give it dense ({name}.to_dense())"


def short(value: int) -> str:
    """Return a large integer in a few digits."""
    return str(value) if abs(value) < 10**24 else f"{value:.6e}" if abs(value) < 10**300 else "larger than any number"


def describe_type(value: Any) -> str:
    """Return the type of a value for a message, with the length of a tuple or list."""
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__ if value is not None else "None"
