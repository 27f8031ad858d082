"""Masks of one rank: applied to the tensors that its optimizer updates, measured and saved.

A masked weight is zero in the forward pass, gets no gradient and has no moments; so it stays zero, and every optimizer
and layout trains the same network. The cost is still that of a dense network, because zeros are multiplied like other
numbers. (csr.py computes with the non-zero weights only.)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn


class OptimizerShards(Protocol):
    """Translation between full weights and the shards that a rank's optimizer updates (labkit.parallel.entries)."""

    def full_tensors(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]: ...

    def optimizer_shards(self, full: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]: ...

    def local_shards(self, full: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]: ...

    def local_parameters(self) -> Mapping[str, nn.Parameter]: ...

    def patterns(self) -> Mapping[str, tuple[nn.Parameter, Any]]: ...

    def average_over_replicas(self, tensor: Tensor) -> Tensor: ...

    def gather_stages(self, values: Mapping[str, Tensor]) -> tuple[Tensor, int]: ...

    def gather_named(self, values: dict[str, Any]) -> dict[str, Any]: ...

    def assert_equal_across_ranks(self, value: int) -> int: ...


class Masks:
    """Masks of the weights that this rank's layers keep."""

    def __init__(self, entries: OptimizerShards, optimizer: torch.optim.Optimizer) -> None:
        self._entries, self._optimizer = entries, optimizer
        self.full_masks: dict[str, Tensor] = {}
        """Boolean masks by name, full on every rank that holds a shard of the weight; empty if all weights are kept."""
        self._shards: list[tuple[nn.Parameter, Tensor]] = []
        self._new: dict[str, int] = {}
        """How many weights the last change added, by name."""
        self.compared = 0
        """How often masks were compared with those of other ranks and were equal."""

    def restore(self, masks: dict[str, Tensor]) -> None:
        """Use the masks of a checkpoint, which may be those of all stages."""
        devices = {name: weight.device for name, weight in self.weights().items()}
        self.full_masks = {name: masks[name].to(device) for name, device in devices.items()}
        for name, (_, pattern) in self._entries.patterns().items():
            pattern.set(self.full_masks[name])
        self._shard()

    def set(self, masks: dict[str, Tensor]) -> dict[str, float]:
        """Use these masks from now on (collective); weights that are added or removed become zero, like their
        moments (but those that the optimizer has frozen).

        Returns the fraction of the kept weights that is new, by name. Raises RuntimeError if other ranks have chosen
        other masks: they would no longer train one network, and nothing else would show it.
        """
        self.compared += self._entries.assert_equal_across_ranks(_fingerprint(masks)) > 1
        unchanged, churn, self._new = {}, {}, {}
        for name, mask in masks.items():
            before = self.full_masks.get(name)
            new = mask & ~before if before is not None else torch.zeros_like(mask)
            # One where a weight stays, which keeps its value and its moments.
            unchanged[name] = (mask & ~new).to(torch.float32)
            self._new[name] = int(new.sum())
            churn[name] = self._new[name] / max(1, int(mask.sum()))
        self._move(masks)
        self.full_masks = dict(masks)
        self._shard()
        # The weights that passes compute with: with ZeRO, the optimizer's shards share their memory.
        for parameter, keeps in self._entries.local_shards(unchanged):
            _multiply(parameter, keeps)
        frozen: frozenset[str] = getattr(self._optimizer, "frozen_state", frozenset())
        for parameter, keeps in self._entries.optimizer_shards(unchanged):
            for name, value in self._moments(parameter):
                if name not in frozen:
                    _multiply(value, keeps)
        return churn

    def _move(self, masks: dict[str, Tensor]) -> None:
        """Move the values of layers that store non-zero weights only to their indices in the new masks."""
        for name, (parameter, pattern) in self._entries.patterns().items():
            moments = [value for _, value in self._moments(parameter)]
            dense = [pattern.to_dense(tensor.detach()) for tensor in (parameter, *moments)]
            pattern.set(masks[name])
            for tensor, full in zip((parameter, *moments), dense, strict=True):
                tensor.detach().copy_(pattern.from_dense(full))

    def _moments(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer's moments of a parameter, with their names."""
        for name, value in self._optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                yield name, value

    def _shard(self) -> None:
        self._shards = list(
            self._entries.optimizer_shards({n: m.to(torch.float32) for n, m in self.full_masks.items()})
        )
        if self.full_masks and hasattr(self._optimizer, "masks_changed"):  # FrozenAdamW, of late compressors
            self._optimizer.masks_changed()

    def mask_gradients(self) -> None:
        """Set the gradients of masked weights to zero."""
        for parameter, shard in self._shards:
            if parameter.grad is not None:
                _multiply(parameter.grad, shard)

    def add_to_gradients(self, full: dict[str, Tensor]) -> None:
        """Add full tensors to the gradients that the optimizer uses."""
        for parameter, shard in self._entries.optimizer_shards(full):
            if parameter.grad is not None:
                _local(parameter.grad).add_(shard)

    def local_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters that the passes of this rank compute with, by name."""
        return self._entries.local_parameters()

    def weights(self) -> dict[str, Tensor]:
        """Return the full weights, by name (collective)."""
        return self._entries.full_tensors(lambda parameter: parameter.detach())

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of their full gradients, which do not change when the optimizer's are masked (collective)."""

        def read(parameter: nn.Parameter) -> Tensor:
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()

        return self._entries.full_tensors(read)

    def average_over_replicas(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its mean over the replicas and return it (collective)."""
        return self._entries.average_over_replicas(tensor)

    def gather_named(self, values: dict[str, Any]) -> dict[str, Any]:
        """Merge the values of all pipeline stages, by name (collective along pp)."""
        return self._entries.gather_named(values)

    def gather_stages(self, values: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Concatenate the values of all stages; return them and where this rank's begin (collective along pp)."""
        return self._entries.gather_stages(values)

    def zeros(self, changed: bool = False) -> dict[str, tuple[int, int]]:
        """Return the zeros and the size of each weight of all pipeline stages, by name (collective).

        Zeros are counted in the tensors that the optimizer updates. Right after masks were `changed`, weights that
        were added are still zero and are not counted.
        """
        counts = {}
        for name, value in self.weights().items():
            new = self._new.get(name, 0) if changed else 0
            counts[name] = int((value == 0).sum()) - new, value.numel()
        return self.gather_named(counts)


def _fingerprint(masks: Mapping[str, Tensor]) -> int:
    """Return a checksum of names and masks."""
    checksum = 0
    for name, mask in masks.items():
        checksum = zlib.crc32(mask.contiguous().cpu().numpy().data, zlib.crc32(name.encode(), checksum))
    return checksum


def _multiply(tensor: Any, factor: Tensor) -> None:
    local = _local(tensor)
    local.mul_(factor.to(local.dtype))


def _local(tensor: Any) -> Tensor:
    """Return the local shard of a tensor, detached from autograd."""
    local: Tensor = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
    return local
