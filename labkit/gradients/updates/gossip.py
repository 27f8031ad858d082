"""Gossip: every rank trains its own weights and averages them with a neighbour now and then; no rank is the middle.

| graph    | who meets                                            | source                       |
|----------|------------------------------------------------------|------------------------------|
| pairs    | an even rank and any odd one, whenever it is ready   | AD-PSGD, Lian et al., 2018   |
| ring     | each with both neighbours, all at once               | D-PSGD, Lian et al., 2017    |
| complete | all with all: with SGD, exactly synchronous training | its limit                    |

Pairs are asynchronous: ranks draw tickets, and nobody waits for a slow one. Even ranks ask, odd ranks answer in a
thread of their own while they compute; so there is no circle of ranks that wait for each other. Both sides take the
mean of the same two sets of weights, so the mean over all ranks stays what it was.

A meeting sends n bytes each way, and a head of 8 before those that ask; on the ring, n bytes to each of the neighbours.
The run is judged by the mean of all ranks, which is also what a checkpoint holds; moments stay local.
"""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from labkit.gradients.updates.own_steps import LocalStepOptions, local_lr_scale
from labkit.gradients.updates.tickets import AsyncUpdateRule
from labkit.gradients.updates.update import AVERAGED, UpdateRule, replicas_only

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

_ASK, _WEIGHTS, _ANSWER = 11, 12, 13
"""Tags of the messages."""
_HEAD_BYTES = 8
"""Before the weights of a rank that asks goes a number: 1, or 0 if it takes its leave."""


class Gossip(AsyncUpdateRule):
    """Average with a neighbour."""

    class Options(LocalStepOptions):
        graph: Literal["pairs", "ring", "complete"] = "pairs"
        """Who meets whom."""
        every: int = Field(default=1, ge=1, le=1_000_000)
        """Updates of a rank between two meetings."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.uses_work_queue = self.options.graph == "pairs"
        self.replicas_diverge = not self.uses_work_queue
        # On a ring the far side hears of a meeting through those between.
        distance = self.comm.size // 2 if self.options.graph == "ring" else 1
        self.max_step_skew = max(1, distance) * self.options.every - 1
        self._random = random.Random(context.experiment.training.seed * 1009 + self.comm.rank)
        self._lock = threading.Lock()
        """Held while weights change."""
        self._merged = self._seen = self._updates = 0
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, kept: bool) -> str:
        """Pairs meet by chance; in rounds, what ranks had to themselves may be lost."""
        if options.graph == "pairs":
            return "which ranks of gossip meet when is chance, so no two runs are alike"
        return AVERAGED if unscheduled and not kept else ""

    def lr_scale(self, step: int) -> float:
        """Ranks step by themselves."""
        return local_lr_scale(self.options, self.context.experiment)

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        pairs = getattr(experiment.gradients.update, "graph", "pairs") == "pairs"
        return AsyncUpdateRule.problems(experiment, machine) if pairs else replicas_only(experiment)

    # -- ring and complete: in rounds ---------------------------------------------------------------------------------

    def after_update(self, step: int) -> int | None:
        """The ranks have stepped: mix their weights with those of their neighbours."""
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
        before, after = self.comm.exchange(own, ((rank - 1) % size, (rank + 1) % size))
        unflatten_into(tensors, (own + before + after).div_(3))
        self.formula_bytes += 2 * own.numel() * own.element_size()
        return None

    def averaged_weights(self) -> AbstractContextManager[None]:
        """By the mean of all ranks."""
        return UpdateRule.averaged_weights(self)

    def average_replicas(self, step: int) -> None:
        """All ranks go on from the mean; in rounds, their moments too."""
        from labkit.gradients.updates.average import average, weights_and_buffers

        if self.uses_work_queue:
            average(weights_and_buffers(self.model), self.comm)
        else:
            UpdateRule.average_replicas(self, step)

    @property
    def comms(self) -> tuple[Communicator, ...]:
        """Pairs talk in a group of their own."""
        return (self.comm, self._pairs) if self.uses_work_queue else (self.comm,)

    # -- pairs: by tickets --------------------------------------------------------------------------------------------

    @property
    def _answers(self) -> bool:
        return self.comm.rank % 2 == 1

    def load(self, state: dict[str, Tensor]) -> None:
        """Make the groups in which pairs talk (collective): messages of different stretches never meet."""
        import torch.distributed as dist

        from labkit.gradients.wire import Communicator

        if self.uses_work_queue:
            self._pairs = Communicator(dist.new_group(backend="gloo"))

    def start_epoch(self, first: int, last: int) -> None:
        """Odd ranks begin to answer."""
        super().start_epoch(first, last)
        if self._answers:
            self._thread = threading.Thread(target=self._answer, name="labkit-gossip", daemon=True)
            self._thread.start()

    def fetch_weights(self) -> None:
        """Remember how often the weights have been mixed."""
        self._seen = self._merged

    def apply_gradient(self, work_item: int) -> int | None:
        """Step with the own gradient; even ranks then meet an odd one. Returns how often others came in between."""
        with self._lock:
            stale = self._merged - self._seen
            self.optimizer.step()
        if self._failure is not None:
            raise self._failure
        self._updates += 1
        if not self._answers and self._updates % self.options.every == 0:
            self._ask(self._random.randrange(1, self.comm.size, 2))
        return stale

    def counters(self) -> Counters | None:
        """Not while an answer is under way."""
        with self._lock:
            return super().counters()

    def _ask(self, neighbour: int) -> None:
        from labkit.gradients.updates.average import unflatten_into, weights_and_buffers

        own = self._weights()
        self._head(1, neighbour)
        asked = self._pairs.send(own, neighbour, _WEIGHTS)
        theirs = self._pairs.receive(own.new_empty(own.shape), neighbour, _ANSWER).wait()
        asked.wait()
        unflatten_into(weights_and_buffers(self.model), ((own + theirs) / 2).to(self._device))
        self.formula_bytes += own.numel() * own.element_size()

    def _answer(self) -> None:
        """Odd ranks: mix with whoever comes, until all even ranks have taken their leave."""
        import torch

        from labkit.gradients.updates.average import unflatten_into, weights_and_buffers

        try:
            guests = -(-self.comm.size // 2)
            head, theirs = torch.zeros(1, dtype=torch.int64), self._weights()
            while guests:
                guest = self._pairs.receive_from_any(head, _ASK)
                if not head[0]:
                    guests -= 1
                    continue
                self._pairs.receive(theirs, guest, _WEIGHTS).wait()
                with self._lock:
                    own = self._weights()
                    unflatten_into(weights_and_buffers(self.model), ((own + theirs) / 2).to(self._device))
                    self._merged += 1
                    leaving = self._pairs.send(own, guest, _ANSWER)
                    self.formula_bytes += own.numel() * own.element_size()
                leaving.wait()
        except BaseException as error:
            self._failure = error

    def _head(self, asks: int, neighbour: int) -> None:
        import torch

        self._pairs.send(torch.tensor([asks]), neighbour, _ASK).wait()
        self.formula_bytes += _HEAD_BYTES

    def _weights(self) -> Tensor:
        """Weights and buffers, on the host."""
        from labkit.gradients.updates.average import flatten, weights_and_buffers

        return flatten(weights_and_buffers(self.model)).cpu()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def close(self) -> None:
        """Even ranks take their leave of all odd ones (collective)."""
        if not self.uses_work_queue:
            return
        if not self._answers:
            for neighbour in range(1, self.comm.size, 2):
                self._head(0, neighbour)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failure is not None:
                raise self._failure
