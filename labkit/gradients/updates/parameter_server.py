"""A parameter server: rank 0 keeps the weights, every rank fetches them, computes a gradient and brings it back.

Nobody waits, up to a bound: no gradient is used that is more than `staleness` updates old. A gradient whose use would
make another one, still being computed or waiting, older than that has to wait; when every rank waits, all are used
together as one mean. So

- staleness 0 is synchronous training: all ranks bring their gradients, one update with their mean follows;
- without a bound (-1) every gradient is used when it comes.

k gradients of N ranks make k/N of an update: the learning rate is that part of it. AdamW divides by the size of what it
sees, and the mean of k gradients is noisier than that of N: there it is √(k/N) of it (own_steps.py). Updates from stale
weights act like a momentum of 1 - 1/N by themselves (Mitliagkas et al., "Asynchrony begets Momentum", 2016), so the
server's own is lower by as much. With `scaled`, a gradient that
is τ updates old counts 1/(1+τ) (Zhang et al., "Staleness-aware Async-SGD", IJCAI 2016). With `backup` = b and
staleness 0, an update takes the first N - b gradients and those that come late are dropped, their samples drawn again
(Chen et al., "Revisiting Distributed Synchronous SGD", 2016).

Rank 0 computes too, with a copy of the model beside the server's thread. A gradient costs n bytes there, the weights
n bytes back; the server's rank sends for all. Ranks talk over gloo, also where they compute on GPUs. If a rank dies,
the supervisor ends the run and names it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.updates.tickets import AsyncUpdateRule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.gradients.exchange import Counters
    from labkit.gradients.updates.update import UpdateContext
    from labkit.gradients.wire import Communicator


class ParameterServer(AsyncUpdateRule):
    """Bounded staleness."""

    class Options(BaseOptions):
        staleness: int = Field(default=16, ge=-1, le=1_000_000)
        """Most updates between the weights that a gradient saw and those it changes: 0 synchronous, -1 no bound."""
        scaled: bool = False
        """Count a gradient that is τ updates old as 1/(1+τ)."""
        momentum: float | None = Field(default=None, ge=0, lt=1)
        """Momentum of the server's optimizer (first beta of AdamW); empty: lower than usual, if not synchronous."""
        backup: int = Field(default=0, ge=0, le=1000)
        """Ranks that a synchronous update does not wait for."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self._claimed_until = 0
        self._next: Any = None

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from AsyncUpdateRule.problems(experiment, machine)
        update: Any = experiment.gradients.update
        if update.backup and update.staleness:
            reason = "backup workers belong to synchronous updates: set staleness to 0"
            yield Problem("gradients.update.backup", reason, 0)
        if update.backup >= experiment.layout.world_size > 1:
            reason = f"an update needs at least one of the {experiment.layout.world_size} ranks"
            yield Problem("gradients.update.backup", reason, experiment.layout.world_size - 1)

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, kept: bool) -> str:
        """Without staleness, every update is the mean over all ranks, whoever comes first."""
        synchronous = options.staleness == 0 and options.backup == 0
        return "" if synchronous else "which rank comes to the server first is chance, so no two runs are alike"

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """Ranks talk to the server in a group of their own."""
        return (self._to_server,)

    def counters(self) -> Counters | None:
        """Rank 0 sends the answers to all others, the others their gradients."""
        with self._client.counters_locked():
            self.formula_bytes = self._client.formula_bytes
            return super().counters()

    def training_module(self) -> nn.Module:
        """Rank 0 computes with a copy: the model itself is the server's."""
        self._working = _copied(self.model) if self.comm.rank == 0 else self.model
        return self._working

    def load(self, state: dict[str, Tensor]) -> None:
        """Make the group in which ranks talk to the server (collective)."""
        import torch.distributed as dist

        from labkit.gradients.updates.gradient_vector import GradientVector
        from labkit.gradients.updates.server import LocalClient, RemoteClient, Server
        from labkit.gradients.wire import Communicator

        comm = Communicator(dist.new_group(backend="gloo"))
        self._server = Server(self.context, comm) if comm.rank == 0 else None
        gradient_bytes = GradientVector(self.model, self.context.irregular).nbytes
        self._client: LocalClient | RemoteClient = (
            LocalClient(self._server) if self._server else RemoteClient(comm, self.model, gradient_bytes)
        )
        self._to_server = comm

    def start_epoch(self, first: int, last: int) -> None:
        """The server begins to listen, every rank asks for its first ticket."""
        if self._server is not None:
            self._server.start_epoch(first, last)
        self._next = self._client.ask()

    def next_work(self, stop: bool) -> int | None:
        """The ticket that came with the weights."""
        if stop or self._next.work_item < 0:
            self._client.leave(self._next)
            return None
        return int(self._next.work_item)

    def fetch_weights(self) -> None:
        """Take over the weights that came with the ticket."""
        from labkit.gradients.updates.average import trainable_weights, unflatten_into

        unflatten_into(trainable_weights(self._working), self._next.weights)

    def apply_gradient(self, work_item: int) -> int | None:
        """Bring the gradient, wait until it has been used or dropped; the answer holds the next ticket."""
        from labkit.gradients.updates.gradient_vector import GradientVector

        gradient = GradientVector(self._working, self.context.irregular).read().cpu()
        self._next = self._client.push(self._next, gradient)
        return None if self._next.dropped else self._next.staleness

    def close(self) -> None:
        """The server answers until all have left (collective)."""
        if self._server is not None:
            self._claimed_until = self._server.close()

    def sync_weights(self) -> None:
        """All learn how far the server has come and get its weights, and the mean of buffers (collective)."""
        import torch

        from labkit.gradients.updates.average import (
            average,
            flatten,
            floating_buffers,
            trainable_weights,
            unflatten_into,
        )

        self._claimed_until = int(self._to_server.broadcast(torch.tensor([self._claimed_until])).wait())
        weights = flatten(trainable_weights(self.model)).cpu()
        unflatten_into(trainable_weights(self.model), self._to_server.broadcast(weights).wait())
        unflatten_into(floating_buffers(self.model), flatten(floating_buffers(self._working)))
        average(floating_buffers(self.model), self.comm)

    @property
    def claimed_until(self) -> int:
        """What the server has handed out and got back."""
        return self._claimed_until


def _copied(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters have the hooks of the original ones, which a copy of a tensor leaves out."""
    from copy import deepcopy

    from labkit.gradients.parameter_hooks import accumulated_hooks, gradient_hooks

    copied = deepcopy(model)
    for original, parameter in zip(model.parameters(), copied.parameters(), strict=True):
        for hook in gradient_hooks(original):
            parameter.register_hook(hook)
        for hook in accumulated_hooks(original):
            parameter.register_post_accumulate_grad_hook(hook)
    return copied
