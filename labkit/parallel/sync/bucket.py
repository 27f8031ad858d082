"""A bucket of gradients that is summed over ranks in one message: the all-reduce of stage 0, and the base of ZeRO's.

With a compressor (labkit.gradients) a bucket of stage 0 is reduced by its comm hook instead.

Parameters that no rank has used in an update are left out of it, as the optimizer of one process leaves out parameters
without a gradient: they neither decay nor follow their momentum. A bucket keeps account of them in `used`.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from labkit.gradients.cost import all_reduce_bytes
from labkit.gradients.exchange import CommHook, GradientReducer
from labkit.gradients.stopwatch import Stopwatch
from labkit.parallel.cut import ShardSpec
from labkit.parallel.decay import with_decay_flags
from labkit.parallel.mesh import Mesh
from labkit.parallel.sync.axes import summed_axes

NamedParameters = list[tuple[str, nn.Parameter, ShardSpec]]


class Bucket:
    """Parameters whose gradients are reduced in one message and summed in full on every rank (stage 0)."""

    num_shards = 1
    """Number of shards of the sum, each on a rank of its own."""

    def __init__(
        self, named: NamedParameters, mesh: Mesh, stopwatch: Stopwatch, reducer: GradientReducer | None = None
    ) -> None:
        self.names = [name for name, _, _ in named]
        self.parameters = [parameter for _, parameter, _ in named]
        self.spec = named[0][2]
        self.length = sum(parameter.numel() for parameter in self.parameters)
        self.pending = len(self.parameters)
        """Number of gradients that have not been computed yet in this pass."""
        self.used = [False] * len(self.parameters)
        """Which parameters have received a gradient in this update; after `finalize`, on any rank."""
        self._mesh = mesh
        self._work: dist.Work | None = None
        self.sent_bytes = 0
        """Bytes that this rank has sent for the bucket so far, by the formulas; without those of a compressor."""
        self._stopwatch = stopwatch
        """Adds up the time spent waiting for reductions."""
        self._allocate()
        group = self._compression_group
        self._comm_hook: CommHook | None = reducer.hook_for(group, summed=True) if reducer and group else None

    def _allocate(self) -> None:
        self._group = self._mesh.group(*summed_axes(self.spec))
        self._allocate_gradients(self.length)

    @property
    def _compression_group(self) -> dist.ProcessGroup | None:
        """The ranks among which a compressor may reduce the gradients."""
        return self._group

    def _allocate_gradients(self, length: int) -> None:
        self.gradient = self.parameters[0].detach().new_zeros(length)
        for view, parameter in zip(self._views(self.gradient), self.parameters, strict=True):
            parameter.grad = view

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat[: self.length].split([parameter.numel() for parameter in self.parameters])
        return [piece.view(parameter.shape) for piece, parameter in zip(pieces, self.parameters, strict=True)]

    def start_reduce(self) -> None:
        """Start to reduce the gradients."""
        if self._comm_hook is not None:
            self._comm_hook.start_reduce(
                self.gradient, self.parameters, [parameter.shape for parameter in self.parameters]
            )
        elif self._group is not None:
            self.sent_bytes += all_reduce_bytes(self.gradient.nbytes, self._group.size())
            self._work = dist.all_reduce(self.gradient, group=self._group, async_op=True)

    def wait(self) -> None:
        """Wait for the reduction."""
        if self._work is not None:
            begun = self._stopwatch.now()
            self._work.wait()
            self._work = None
            self._stopwatch.add(begun)
        elif self._comm_hook is not None:
            self._comm_hook.wait()
        self.pending = len(self.parameters)

    def release_unused(self) -> None:
        """Set gradients of parameters not used so far to None, so that a pass that no hook sees makes new tensors."""
        self._released = [index for index, used in enumerate(self.used) if not used]
        for index in self._released:
            self.parameters[index].grad = None

    def collect_used(self) -> None:
        """Copy the gradients that such a pass has made into the bucket and mark their parameters as used."""
        views = self._views(self.gradient)
        for index in self._released:
            gradient = self.parameters[index].grad
            if gradient is not None:
                views[index].copy_(gradient)
                self.used[index] = True
            self.parameters[index].grad = views[index]

    def finalize(self) -> None:
        """After the last pass of an update, remove the gradients of parameters that no rank has used."""
        for parameter, used in zip(self.parameters, self.used, strict=True):
            if not used:
                parameter.grad = None

    @property
    def reduced_gradient(self) -> Tensor:
        """The part of the reduced gradient that this rank keeps, flat."""
        return self.gradient

    def optimizer_parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the parameters that the optimizer updates, each with whether weight decay applies to it."""
        return with_decay_flags(self.parameters)

    def clear(self) -> None:
        """Set the gradients to zero for the next update."""
        self.gradient.zero_()
        for index, (view, parameter) in enumerate(zip(self._views(self.gradient), self.parameters, strict=True)):
            if not self.used[index]:
                parameter.grad = view
            self.used[index] = False
