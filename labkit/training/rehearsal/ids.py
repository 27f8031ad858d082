"""Ids beyond what an embedding has rows for are named by their sample, before the device fails over them.

On a GPU such an id ends in an assertion of the device from which no process recovers.
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
    """The embeddings of a model, and which of them are given the samples' x as it is."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._of_x: dict[str, int] = {}
        """Rows of the embeddings that are given x itself, by name."""

    @contextmanager
    def checked(self, x: Tensor, indices: list[int], what: str) -> Iterator[None]:
        """Inside, a pass over x, the samples `indices` of `what`, raises TaskFault before an id is looked up amiss."""

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
            # A subclass may take its input for something else than ids, such as the number of positions.
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
        """All samples that lie in memory."""
        while isinstance(data, Cast):
            data = data.data
        if isinstance(data, TensorData):
            self.check_samples(data.tensors["x"], 0, what)
        elif isinstance(data, Windows):
            self.check_samples(data.inputs(), 0, what)

    def check_samples(self, x: Tensor, first: int, what: str) -> None:
        """The samples from `first` on, whose inputs are x."""
        for name, rows in self._of_x.items():
            row = first_beyond(x, rows)
            if row is not None:
                raise TaskFault(_sentence(f"sample {first + row} of {what}", x[row], name, rows))


def first_beyond(ids: Tensor, rows: int) -> int | None:
    """The first row of `ids` in which some id is not from 0 to before `rows`; None if all are."""
    if ids.is_floating_point() or not ids.numel():
        return None
    low, high = (int(extreme) for extreme in torch.aminmax(ids))
    if low >= 0 and high < rows:
        return None
    beyond = _beyond(ids, rows)
    return int((beyond.flatten(1).any(1) if ids.dim() > 1 else beyond).nonzero()[0])


def _beyond(ids: Tensor, rows: int) -> Tensor:
    """Which ids are not from 0 to before `rows`; as int64, since a bound of 256 is 0 among numbers of 8 bits."""
    ids = ids.long()
    return (ids < 0) | (ids >= rows)


def _sentence(sample: str, ids: Tensor, name: str, rows: int) -> str:
    value = int(ids[_beyond(ids, rows)].flatten()[0]) if ids.dim() else int(ids)
    return (
        f"{sample} has the id {value}, but {name} has {rows} rows (ids 0 to {rows - 1}): give it more rows "
        "(num_embeddings), or other ids to the samples"
    )
