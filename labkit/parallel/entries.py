"""Between whole weights by name and what the optimizer of this rank works on.

Whoever decides about single weights (which of them stay, for one) wants to see a weight whole, whatever the layout; and
what was decided has to reach the parts that the optimizer works on: a whole parameter, its part under tensor
parallelism, the rows that `fully_shard` gives a rank, or a stretch of a bucket (ZeRO 1 and 2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel.cut import Pattern, ShardSpec
from labkit.parallel.shard import local
from labkit.parallel.state import Spread, parameters_of, part_of, whole_of


class Entries:
    """The parameters called `names`, as far as the stages of this rank hold them."""

    def __init__(self, model: Spread, names: Collection[str]) -> None:
        self._model, self._mesh = model, model.mesh
        self._parameters = {name: parameter for name, parameter in parameters_of(model) if name in names}
        self._buckets = [bucket for bucket in model.sharded if set(bucket.names) & set(self._parameters)]

    def whole(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """What `read` finds at the optimizer's parameters (weight, gradient, moment), whole, by name.

        Collective among the ranks that hold parts of the same weights.
        """
        found: dict[str, Tensor] = {}
        if self._model.sharded:
            for bucket in self._buckets:
                for name, value in bucket.gathered(bucket.joined(read, bucket.values.dtype)).items():
                    if name in self._parameters:
                        found[name] = whole_of(value, self._holding(name), self._mesh)
        else:
            for name, parameter in self._parameters.items():
                found[name] = whole_of(read(parameter), self._holding(name), self._mesh)
        return {name: found[name] for name in self._parameters}

    def parts(self, whole: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The optimizer's parameters, each with its part of `whole`, in the parameter's own number format."""
        if self._model.sharded:
            for piece in (piece for bucket in self._buckets for piece in bucket.pieces):
                if piece.name in self._parameters:
                    part = piece.of(part_of(whole[piece.name], self._model, piece.name))
                    yield piece.own, part.to(piece.own.device, piece.own.dtype, copy=True)
        else:
            yield from self.held_parts(whole)

    def held_parts(self, whole: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The parameters that the passes of this rank compute with, each with its part of `whole`."""
        for name, parameter in self._parameters.items():
            part = part_of(whole[name], self._model, name, like=parameter)
            yield parameter, part.to(parameter.device, local(parameter).dtype)

    def held(self) -> Mapping[str, nn.Parameter]:
        """The parameters that the passes of this rank compute with, by name."""
        return self._parameters

    def patterns(self) -> dict[str, tuple[nn.Parameter, Pattern]]:
        """The parameters that hold the values of a sparse matrix."""
        found = {}
        for name, parameter in self._parameters.items():
            pattern = self._holding(name).pattern
            if pattern is not None:
                found[name] = parameter, pattern
        return found

    def averaged(self, tensor: Tensor) -> Tensor:
        """The mean over the replicas, in place (collective; for data parallelism alone)."""
        if dist.is_initialized():
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
        return tensor

    def stages_together(self, values: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """The values of all stages of the pipeline in one row, and where this rank's begin (collective along pp)."""
        own = torch.cat([value.flatten() for value in values.values()]) if values else torch.zeros(0)
        group = self._mesh.group("pp")
        if group is None:
            return own, 0
        parts: list[Any] = [None] * group.size()
        dist.all_gather_object(parts, own.cpu(), group=group)
        place = self._mesh.index("pp")
        return torch.cat(parts).to(own.device), sum(len(part) for part in parts[:place])

    def named_together(self, values: dict[str, Any]) -> dict[str, Any]:
        """What all stages of the pipeline know, by name (collective along pp)."""
        group = self._mesh.group("pp")
        if group is None:
            return values
        parts: list[Any] = [None] * group.size()
        dist.all_gather_object(parts, values, group=group)
        return {name: value for part in parts for name, value in part.items()}

    def agreed(self, said: int) -> int:
        """How many ranks that hold the same stages of the pipeline say the same as this one (collective).

        RuntimeError if one of them says something else.
        """
        if not dist.is_initialized():
            return 1
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self._mesh.index("pp"), said))
        same = [other for stage, other in parts if stage == self._mesh.index("pp")]
        if set(same) != {said}:
            raise RuntimeError("ranks that hold the same weights have chosen different ones to be zero")
        return len(same)

    def _holding(self, name: str) -> ShardSpec:
        return self._model.holdings.get(name, ShardSpec())
