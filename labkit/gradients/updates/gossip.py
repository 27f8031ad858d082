"""Gossip: every rank trains its own weights and averages them with a neighbour now and then, without a central rank.

| graph    | who averages                                         | source                       |
|----------|------------------------------------------------------|------------------------------|
| pairs    | an even rank and any odd one, whenever it is ready   | AD-PSGD, Lian et al., 2018   |
| ring     | each with both neighbours, all at once               | D-PSGD, Lian et al., 2017    |
| complete | all with all: with SGD, exactly synchronous training | the limit of both            |

Pairs are asynchronous: ranks take work from a queue, and nobody waits for a slow rank. Even ranks send requests, and
odd ranks answer them in a separate thread while they compute, so ranks cannot wait for each other in a cycle. Both
sides take the mean of the same two sets of weights, so the mean over all ranks does not change.

One averaging of a pair sends n bytes each way, and a header of 8 bytes with the request; on the ring, each rank sends n
bytes to each neighbour. The run is evaluated with the mean of all ranks, which is also what a checkpoint stores;
moments stay local.
"""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from labkit.gradients.updates.own_steps import LocalStepOptions, local_lr_scale
from labkit.gradients.updates.tickets import AsyncUpdateRule
from labkit.gradients.updates.update import AVERAGED, UpdateRule, recomputes_nothing, replicas_only

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.gradients.exchange import Counters
    from labkit.gradients.updates.update import UpdateContext
    from labkit.gradients.wire import Communicator

_REQUEST, _WEIGHTS, _REPLY = 11, 12, 13
"""Message tags."""
_HEADER_BYTES = 8
"""Bytes of the header of a request, an integer: 1 if weights follow, 0 if the rank signs off."""


class Gossip(AsyncUpdateRule):
    """Averages the weights of neighbours, in pairs, on a ring or over all ranks."""

    class Options(LocalStepOptions):
        graph: Literal["pairs", "ring", "complete"] = "pairs"
        """Which ranks average their weights: asynchronous pairs, both neighbours on a ring, or all ranks."""
        every: int = Field(default=1, ge=1, le=1_000_000)
        """Optimizer steps of a rank between two averagings."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.uses_work_queue = self.options.graph == "pairs"
        self.replicas_diverge = not self.uses_work_queue
        # On a ring, the opposite rank is reached only through those between.
        distance = self.comm.size // 2 if self.options.graph == "ring" else 1
        self.max_step_skew = max(1, distance) * self.options.every - 1
        self._random = random.Random(context.experiment.training.seed * 1009 + self.comm.rank)
        self._lock = threading.Lock()
        """Held while weights change."""
        self._merged = self._merged_before = self._updates = 0
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, restores_local_state: bool) -> str:
        """Return why the resume is not exact: pairs form by chance; otherwise local weights may be lost."""
        if options.graph == "pairs":
            return "which ranks of gossip average when depends on timing, so no two runs are alike"
        return AVERAGED if unscheduled and not restores_local_state else ""

    def lr_scale(self, step: int) -> float:
        """Return the learning-rate multiplier of local steps."""
        return local_lr_scale(self.options, self.context.experiment)

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        pairs = getattr(experiment.gradients.update, "graph", "pairs") == "pairs"
        if pairs:
            yield from AsyncUpdateRule.problems(experiment, machine)
            yield from recomputes_nothing(experiment)
        else:
            yield from replicas_only(experiment)

    # -- ring and complete: in rounds ---------------------------------------------------------------------------------

    def after_update(self, step: int) -> int | None:
        """Average the weights with those of the neighbours, if it is time."""
        from labkit.gradients.updates.average import (
            average,
            average_bytes,
            flatten,
            unflatten_into,
            weights_and_buffers,
        )

        if (step + 1) % self.options.every:
            return None
        tensors = weights_and_buffers(self.model)
        if self.options.graph == "complete" or self.comm.size <= 3:  # up to three ranks, a ring is complete
            average(tensors, self.comm)
            self.formula_bytes += average_bytes(tensors, self.comm.size)
            return None
        own = flatten(tensors)
        size, rank = self.comm.size, self.comm.rank
        before, after = self.comm.send_and_receive(own, ((rank - 1) % size, (rank + 1) % size))
        unflatten_into(tensors, (own + before + after).div_(3))
        self.formula_bytes += 2 * own.numel() * own.element_size()
        return None

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context manager in which the model holds the mean over all ranks."""
        return UpdateRule.averaged_weights(self)

    def average_replicas(self, step: int) -> None:
        """Replace weights and buffers, and without a work queue the moments too, by their mean over all ranks."""
        from labkit.gradients.updates.average import average, weights_and_buffers

        if self.uses_work_queue:
            average(weights_and_buffers(self.model), self.comm)
        else:
            UpdateRule.average_replicas(self, step)

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """All communicators that this rule uses; pairs have one of their own."""
        return (self.comm, self._pairs) if self.uses_work_queue else (self.comm,)

    # -- pairs: with a work queue -------------------------------------------------------------------------------------

    @property
    def _answers(self) -> bool:
        return self.comm.rank % 2 == 1

    def load(self, state: dict[str, Tensor]) -> None:
        """Create the process group in which pairs exchange weights (collective)."""
        import torch.distributed as dist

        from labkit.gradients.wire import Communicator

        if self.uses_work_queue:
            self._pairs = Communicator(dist.new_group(backend="gloo"))

    def start_epoch(self, first: int, last: int) -> None:
        """Open the work queue; odd ranks start to answer requests."""
        super().start_epoch(first, last)
        if self._answers:
            self._thread = threading.Thread(target=self._answer, name="labkit-gossip", daemon=True)
            self._thread.start()

    def fetch_weights(self) -> None:
        """Record how often the weights have been averaged so far."""
        self._merged_before = self._merged

    def apply_gradient(self, work_item: int) -> int | None:
        """Step with this rank's gradient; an even rank then averages with an odd one.

        Returns how often requests of other ranks changed the weights since the gradient was started.
        """
        with self._lock:
            staleness = self._merged - self._merged_before
            self.optimizer.step()
        if self._failure is not None:
            raise self._failure
        self._updates += 1
        if not self._answers and self._updates % self.options.every == 0:
            self._request(self._random.randrange(1, self.comm.size, 2))
        return staleness

    def counters(self) -> Counters | None:
        """Return the costs so far, read while no reply is being sent."""
        with self._lock:
            return super().counters()

    def _request(self, neighbour: int) -> None:
        from labkit.gradients.updates.average import unflatten_into, weights_and_buffers

        own = self._weights()
        self._send_header(1, neighbour)
        request = self._pairs.send(own, neighbour, _WEIGHTS)
        theirs = self._pairs.receive(own.new_empty(own.shape), neighbour, _REPLY).wait()
        request.wait()
        unflatten_into(weights_and_buffers(self.model), ((own + theirs) / 2).to(self._device))
        self.formula_bytes += own.numel() * own.element_size()

    def _answer(self) -> None:
        """Average with every rank that sends a request, until all even ranks have signed off (on odd ranks)."""
        import torch

        from labkit.gradients.updates.average import unflatten_into, weights_and_buffers

        try:
            clients = -(-self.comm.size // 2)
            header, theirs = torch.zeros(1, dtype=torch.int64), self._weights()
            while clients:
                client = self._pairs.receive_from_any(header, _REQUEST)
                if not header[0]:
                    clients -= 1
                    continue
                self._pairs.receive(theirs, client, _WEIGHTS).wait()
                with self._lock:
                    own = self._weights()
                    unflatten_into(weights_and_buffers(self.model), ((own + theirs) / 2).to(self._device))
                    self._merged += 1
                    reply = self._pairs.send(own, client, _REPLY)
                    self.formula_bytes += own.numel() * own.element_size()
                reply.wait()
        except BaseException as error:
            self._failure = error

    def _send_header(self, request: int, neighbour: int) -> None:
        import torch

        self._pairs.send(torch.tensor([request]), neighbour, _REQUEST).wait()
        self.formula_bytes += _HEADER_BYTES

    def _weights(self) -> Tensor:
        """Return weights and buffers as one flat tensor on the CPU."""
        from labkit.gradients.updates.average import flatten, weights_and_buffers

        return flatten(weights_and_buffers(self.model)).cpu()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def close(self) -> None:
        """Sign off: even ranks tell all odd ones, whose threads then end (collective)."""
        if not self.uses_work_queue:
            return
        if not self._answers:
            for neighbour in range(1, self.comm.size, 2):
                self._send_header(0, neighbour)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failure is not None:
                raise self._failure
