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

from labkit.gradients.updates.own_steps import LocalStepOptions, own_rate
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

    def __init__(self, setting: UpdateContext) -> None:
        super().__init__(setting)
        self.draws = self.options.graph == "pairs"
        self.parts_ways = not self.draws
        # On a ring the far side hears of a meeting through those between.
        distance = self.wire.size // 2 if self.options.graph == "ring" else 1
        self.apart = max(1, distance) * self.options.every - 1
        self._random = random.Random(setting.experiment.training.seed * 1009 + self.wire.rank)
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

    def rate_factor(self, step: int) -> float:
        """Ranks step by themselves."""
        return own_rate(self.options, self.setting.experiment)

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        pairs = getattr(experiment.gradients.update, "graph", "pairs") == "pairs"
        return AsyncUpdateRule.problems(experiment, machine) if pairs else replicas_only(experiment)

    # -- ring and complete: in rounds ---------------------------------------------------------------------------------

    def after_update(self, step: int) -> int | None:
        """The ranks have stepped: mix their weights with those of their neighbours."""
        from labkit.gradients.updates.average import average, average_bytes, fill, flat, state_of

        if (step + 1) % self.options.every:
            return None
        tensors = state_of(self.model)
        if self.options.graph == "complete" or self.wire.size <= 3:  # up to three ranks, a ring is complete
            average(tensors, self.wire)
            self.formula_bytes += average_bytes(tensors, self.wire.size)
            return None
        own = flat(tensors)
        size, rank = self.wire.size, self.wire.rank
        before, after = self.wire.exchange(own, ((rank - 1) % size, (rank + 1) % size))
        fill(tensors, (own + before + after).div_(3))
        self.formula_bytes += 2 * own.numel() * own.element_size()
        return None

    def judged(self) -> AbstractContextManager[None]:
        """By the mean of all ranks."""
        return UpdateRule.judged(self)

    def consolidate(self, step: int) -> None:
        """All ranks go on from the mean; in rounds, their moments too."""
        from labkit.gradients.updates.average import average, state_of

        if self.draws:
            average(state_of(self.model), self.wire)
        else:
            UpdateRule.consolidate(self, step)

    @property
    def wires(self) -> tuple[Communicator, ...]:
        """Pairs talk in a group of their own."""
        return (self.wire, self._pairs) if self.draws else (self.wire,)

    # -- pairs: by tickets --------------------------------------------------------------------------------------------

    @property
    def _answers(self) -> bool:
        return self.wire.rank % 2 == 1

    def load(self, state: dict[str, Tensor]) -> None:
        """Make the groups in which pairs talk (collective): messages of different stretches never meet."""
        import torch.distributed as dist

        from labkit.gradients.wire import Communicator

        if self.draws:
            self._pairs = Communicator(dist.new_group(backend="gloo"))

    def open(self, first: int, last: int) -> None:
        """Odd ranks begin to answer."""
        super().open(first, last)
        if self._answers:
            self._thread = threading.Thread(target=self._answer, name="labkit-gossip", daemon=True)
            self._thread.start()

    def pull(self) -> None:
        """Remember how often the weights have been mixed."""
        self._seen = self._merged

    def push(self, ticket: int) -> int | None:
        """Step with the own gradient; even ranks then meet an odd one. Returns how often others came in between."""
        with self._lock:
            stale = self._merged - self._seen
            self.optimizer.step()
        if self._failure is not None:
            raise self._failure
        self._updates += 1
        if not self._answers and self._updates % self.options.every == 0:
            self._ask(self._random.randrange(1, self.wire.size, 2))
        return stale

    def counters(self) -> Counters | None:
        """Not while an answer is under way."""
        with self._lock:
            return super().counters()

    def _ask(self, neighbour: int) -> None:
        from labkit.gradients.updates.average import fill, state_of

        own = self._weights()
        self._head(1, neighbour)
        asked = self._pairs.send(own, neighbour, _WEIGHTS)
        theirs = self._pairs.receive(own.new_empty(own.shape), neighbour, _ANSWER).wait()
        asked.wait()
        fill(state_of(self.model), ((own + theirs) / 2).to(self._device))
        self.formula_bytes += own.numel() * own.element_size()

    def _answer(self) -> None:
        """Odd ranks: mix with whoever comes, until all even ranks have taken their leave."""
        import torch

        from labkit.gradients.updates.average import fill, state_of

        try:
            guests = -(-self.wire.size // 2)
            head, theirs = torch.zeros(1, dtype=torch.int64), self._weights()
            while guests:
                guest = self._pairs.receive_from_anyone(head, _ASK)
                if not head[0]:
                    guests -= 1
                    continue
                self._pairs.receive(theirs, guest, _WEIGHTS).wait()
                with self._lock:
                    own = self._weights()
                    fill(state_of(self.model), ((own + theirs) / 2).to(self._device))
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
        from labkit.gradients.updates.average import flat, state_of

        return flat(state_of(self.model)).cpu()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def close(self) -> None:
        """Even ranks take their leave of all odd ones (collective)."""
        if not self.draws:
            return
        if not self._answers:
            for neighbour in range(1, self.wire.size, 2):
                self._head(0, neighbour)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._failure is not None:
                raise self._failure
