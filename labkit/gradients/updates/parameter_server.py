"""A parameter server: rank 0 keeps the weights; every rank fetches them, computes a gradient and sends it back.

Ranks do not wait for each other, except to bound staleness: no gradient is applied that is more than `staleness`
updates old. A gradient has to wait if applying it would make another one, which is being computed or waits itself,
older than that; when all ranks wait, the mean of their gradients is applied. So

- staleness 0 is synchronous training: all ranks send their gradients, and one update with their mean follows;
- without a bound (-1) every gradient is applied when it arrives.

An update from k gradients of N ranks has k/N of the learning rate. AdamW divides by the size of its gradients, and the
mean of k gradients is noisier than that of N: there the factor is √(k/N) (own_steps.py). Updates from stale weights act
like a momentum of 1 - 1/N by themselves (Mitliagkas et al., "Asynchrony begets Momentum", 2016), so the momentum of the
server's optimizer is lower by that amount. With `scaled`, a gradient that is τ updates old has the weight 1/(1+τ)
(Zhang et al., "Staleness-aware Async-SGD", IJCAI 2016). With `backup` = b and staleness 0, an update uses the first
N - b gradients; those that come late are dropped, and their samples are computed again (Chen et al., "Revisiting
Distributed Synchronous SGD", 2016).

Rank 0 computes gradients too, with a copy of the model next to the server's thread. Every gradient sends n bytes to the
server, and the reply n bytes of weights back; rank 0 sends all replies. Ranks communicate by gloo even if they compute
on GPUs. If a rank dies, the supervisor ends the run and names it.
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
    """Applies the gradients of all ranks on a server, asynchronously with bounded staleness."""

    class Options(BaseOptions):
        staleness: int = Field(default=16, ge=-1, le=1_000_000)
        """Maximum number of updates by which a gradient may be stale: 0 is synchronous, -1 means no bound."""
        scaled: bool = False
        """Weight a gradient that is τ updates old by 1/(1+τ)."""
        momentum: float | None = Field(default=None, ge=0, lt=1)
        """Momentum of the server's optimizer (first beta of AdamW); if empty, lower than usual unless synchronous."""
        backup: int = Field(default=0, ge=0, le=1000)
        """Number of ranks that a synchronous update does not wait for."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self._claimed_until = 0
        self._reply: Any = None

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        yield from AsyncUpdateRule.problems(experiment, machine)
        update: Any = experiment.gradients.update
        if update.backup and update.staleness:
            reason = "backup workers belong to synchronous updates: set staleness to 0"
            yield Problem("gradients.update.backup", reason, 0)
        if update.backup >= experiment.layout.world_size > 1:
            reason = f"an update needs at least one of the {experiment.layout.world_size} ranks"
            yield Problem("gradients.update.backup", reason, experiment.layout.world_size - 1)

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, restores_local_state: bool) -> str:
        """Return why the resume is not exact; without staleness it is: every update is the mean over all ranks."""
        synchronous = options.staleness == 0 and options.backup == 0
        return (
            "" if synchronous else "which gradient reaches the server first depends on timing, so no two runs are alike"
        )

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """All communicators that this rule uses: clients and server have one of their own."""
        return (self._to_server,)

    def counters(self) -> Counters | None:
        """Return the costs so far: rank 0 sends the replies to all others, the others send their gradients."""
        with self._client.counters_locked():
            self.formula_bytes = self._client.formula_bytes
            return super().counters()

    def training_module(self) -> nn.Module:
        """Return the model or, on rank 0, a copy of it, since the server updates the model itself."""
        self._working = _copied(self.model) if self.comm.rank == 0 else self.model
        return self._working

    def load(self, state: dict[str, Tensor]) -> None:
        """Create the process group of server and clients, the server and this rank's client (collective)."""
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
        """Start the server's thread; every rank requests its first work item (collective)."""
        if self._server is not None:
            self._server.start_epoch(first, last)
        self._reply = self._client.ask()

    def next_work(self, stop: bool) -> int | None:
        """Return the work item that came with the weights; None if there is none or this rank is to `stop`."""
        if stop or self._reply.work_item < 0:
            self._client.sign_off(self._reply)
            return None
        return int(self._reply.work_item)

    def fetch_weights(self) -> None:
        """Load the weights that came with the work item."""
        from labkit.gradients.updates.average import trainable_weights, unflatten_into

        unflatten_into(trainable_weights(self._working), self._reply.weights)

    def apply_gradient(self, work_item: int) -> int | None:
        """Send the gradient and wait until it was applied or dropped; the reply has the next work item.

        Returns the staleness of the gradient, or None if it was dropped.
        """
        from labkit.gradients.updates.gradient_vector import GradientVector

        gradient = GradientVector(self._working, self.context.irregular).read().cpu()
        self._reply = self._client.send_gradient(self._reply, gradient)
        return None if self._reply.dropped else self._reply.staleness

    def close(self) -> None:
        """Wait until the server has replied to all ranks and they have signed off (collective)."""
        if self._server is not None:
            self._claimed_until = self._server.close()

    def sync_weights(self) -> None:
        """Broadcast the server's progress and weights, and average the buffers of all ranks (collective)."""
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
        """Index up to which all work items have been handed out and completed."""
        return self._claimed_until


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy of the model with the hooks of its parameters, which `deepcopy` leaves out."""
    from copy import deepcopy

    from labkit.gradients.parameter_hooks import accumulated_hooks, gradient_hooks

    copied = deepcopy(model)
    for original, parameter in zip(model.parameters(), copied.parameters(), strict=True):
        for hook in gradient_hooks(original):
            parameter.register_hook(hook)
        for hook in accumulated_hooks(original):
            parameter.register_post_accumulate_grad_hook(hook)
    return copied
