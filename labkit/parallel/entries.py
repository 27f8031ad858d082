"""Translate between full weights by name and the shards that the optimizer of this rank updates.

Code that decides about single weights (which of them to prune, for example) wants to see a weight as a whole, whatever
the layout, and its decision has to reach the tensors that the optimizer updates: a whole parameter, its shard under
tensor parallelism, the rows that `fully_shard` gives a rank, or a stretch of a bucket (ZeRO 1 and 2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel.cut import Pattern, ShardSpec
from labkit.parallel.shard import to_local
from labkit.parallel.state import ShardedModel, full_tensor, local_shard, parameters_of


class OptimizerShards:
    """The parameters called `names` that the stages of this rank hold."""

    def __init__(self, model: ShardedModel, names: Collection[str]) -> None:
        self._model, self._mesh = model, model.mesh
        self._parameters = {name: parameter for name, parameter in parameters_of(model) if name in names}
        self._buckets = [bucket for bucket in model.sharded if set(bucket.names) & set(self._parameters)]

    def full_tensors(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Apply `read` to the optimizer's parameters and return the full results (weights, gradients, …) by name.

        Collective among the ranks that hold shards of the same weights.
        """
        tensors: dict[str, Tensor] = {}
        if self._model.sharded:
            for bucket in self._buckets:
                flat = bucket.flat_shard(read, bucket.flat_parameters.dtype)
                for name, value in bucket.all_gather_by_name(flat).items():
                    if name in self._parameters:
                        tensors[name] = full_tensor(value, self._shard_spec(name), self._mesh)
        else:
            for name, parameter in self._parameters.items():
                tensors[name] = full_tensor(read(parameter), self._shard_spec(name), self._mesh)
        return {name: tensors[name] for name in self._parameters}

    def optimizer_shards(self, full: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the optimizer's parameters, each with its shard of the tensors `full`, in the parameter's dtype."""
        if self._model.sharded:
            for piece in (piece for bucket in self._buckets for piece in bucket.pieces):
                if piece.name in self._parameters:
                    shard = piece.select(local_shard(full[piece.name], self._model, piece.name))
                    yield piece.shard, shard.to(piece.shard.device, piece.shard.dtype, copy=True)
        else:
            yield from self.local_shards(full)

    def local_shards(self, full: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the parameters used in this rank's forward passes, each with its shard of the tensors `full`."""
        for name, parameter in self._parameters.items():
            shard = local_shard(full[name], self._model, name, like=parameter)
            yield parameter, shard.to(parameter.device, to_local(parameter).dtype)

    def local_parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters used in this rank's forward passes, by name."""
        return self._parameters

    def patterns(self) -> dict[str, tuple[nn.Parameter, Pattern]]:
        """Return the parameters that hold the values of a sparse matrix, each with its sparsity pattern."""
        patterns = {}
        for name, parameter in self._parameters.items():
            pattern = self._shard_spec(name).pattern
            if pattern is not None:
                patterns[name] = parameter, pattern
        return patterns

    def average_over_replicas(self, tensor: Tensor) -> Tensor:
        """Average the tensor over all ranks, in place, and return it (collective; only for plain data parallelism)."""
        if dist.is_initialized():
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
        return tensor

    def gather_stages(self, values: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Concatenate the flat values of all pipeline stages; return them and the offset of this rank's values.

        Collective along pp.
        """
        own = torch.cat([value.flatten() for value in values.values()]) if values else torch.zeros(0)
        group = self._mesh.group("pp")
        if group is None:
            return own, 0
        stages: list[Any] = [None] * group.size()
        dist.all_gather_object(stages, own.cpu(), group=group)
        index = self._mesh.index("pp")
        return torch.cat(stages).to(own.device), sum(len(stage) for stage in stages[:index])

    def gather_named(self, values: dict[str, Any]) -> dict[str, Any]:
        """Merge the dictionaries of all pipeline stages (collective along pp)."""
        group = self._mesh.group("pp")
        if group is None:
            return values
        stages: list[Any] = [None] * group.size()
        dist.all_gather_object(stages, values, group=group)
        return {name: value for stage in stages for name, value in stage.items()}

    def assert_equal_across_ranks(self, fingerprint: int) -> int:
        """Raise RuntimeError if a rank with the same pipeline stages has another fingerprint of its masks (collective).

        Returns the number of ranks that hold the same stages, this one included.
        """
        if not dist.is_initialized():
            return 1
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self._mesh.index("pp"), fingerprint))
        fingerprints = [value for stage, value in gathered if stage == self._mesh.index("pp")]
        if set(fingerprints) != {fingerprint}:
            raise RuntimeError("ranks that hold the same weights have chosen different ones to be zero")
        return len(fingerprints)

    def _shard_spec(self, name: str) -> ShardSpec:
        return self._model.shard_specs.get(name, ShardSpec())
