"""Report ids that are out of range for an embedding, with their sample, before the device fails on them.

On a GPU such an id triggers a device-side assertion, from which no process recovers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from labkit.experiment.fault import TaskFault
from labkit.workloads.base import Data, TensorData
from labkit.workloads.samples import Cast
from labkit.workloads.text import Windows


class Ids:
    """Range check of the ids that embeddings look up; it records which embeddings receive the samples' x itself."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._of_x: dict[str, int] = {}
        """Number of rows of the embeddings that receive x itself, by name."""

    @contextmanager
    def checked(self, x: Tensor, indices: list[int], what: str) -> Iterator[None]:
        """Check all lookups of a pass over x, the samples `indices` of `what`; raise TaskFault if an id is invalid."""

        def check(name: str) -> Callable[[nn.Module, Any], None]:
            def hook(module: Any, positional: Any) -> None:
                with _disable_current_modes():
                    ids = positional[0] if positional else None
                    if isinstance(ids, Tensor) and ids.numel():
                        self._check(name, module.num_embeddings, ids, x, indices, what)

            return hook

        handles = [
            module.register_forward_pre_hook(check(name or "the embedding"))
            for name, module in self._model.named_modules()
            # A subclass may interpret its input as something other than ids, such as the number of positions.
            if type(module).forward in (nn.Embedding.forward, nn.EmbeddingBag.forward)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, name: str, rows: int, ids: Tensor, x: Tensor, indices: list[int], what: str) -> None:
        if ids is x or (ids.shape == x.shape and bool(torch.equal(ids, x))):
            self._of_x[name] = rows
        row = first_beyond(ids, rows)
        if row is not None:
            sample = f"sample {indices[row]}" if len(ids) == len(indices) else f"one of the samples {indices}"
            raise TaskFault(_sentence(f"{sample} of {what}", ids if len(ids) != len(indices) else ids[row], name, rows))

    def check_all(self, data: Data, what: str) -> None:
        """Check all samples of data in memory; raise TaskFault for the first id that is out of range."""
        while isinstance(data, Cast):
            data = data.data
        if isinstance(data, TensorData):
            self.check_samples(data.tensors["x"], 0, what)
        elif isinstance(data, Windows):
            self.check_samples(data.inputs(), 0, what)

    def check_samples(self, x: Tensor, first: int, what: str) -> None:
        """Check the samples from index `first` on, whose inputs are x; raise TaskFault if an id is out of range."""
        for name, rows in self._of_x.items():
            row = first_beyond(x, rows)
            if row is not None:
                raise TaskFault(_sentence(f"sample {first + row} of {what}", x[row], name, rows))


def first_beyond(ids: Tensor, rows: int) -> int | None:
    """Return the first row of `ids` with an id outside of [0, `rows`); None if there is none."""
    if ids.is_floating_point() or not ids.numel():
        return None
    low, high = (int(extreme) for extreme in torch.aminmax(ids))
    if low >= 0 and high < rows:
        return None
    beyond = _beyond(ids, rows)
    return int((beyond.flatten(1).any(1) if ids.dim() > 1 else beyond).nonzero()[0])


def _beyond(ids: Tensor, rows: int) -> Tensor:
    """Return a mask of the ids outside of [0, `rows`); computed in int64, since a bound of 256 is 0 in 8 bits."""
    ids = ids.long()
    return (ids < 0) | (ids >= rows)


def _sentence(sample: str, ids: Tensor, name: str, rows: int) -> str:
    value = int(ids[_beyond(ids, rows)].flatten()[0]) if ids.dim() else int(ids)
    return (
        f"{sample} has the id {value}, but {name} has {rows} rows (ids 0 to {rows - 1}): give it more rows "
        "(num_embeddings), or change the ids of the samples"
    )
