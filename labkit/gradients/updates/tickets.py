"""Update rules in which nobody waits for the slowest: ranks draw one piece of work after the other.

Ticket k stands for the share k mod N of update k div N, of N shares: the same samples as in the rounds of N ranks, but
who takes which, and when, is decided by who is free. Tickets are drawn in stretches, [first, last); between two
stretches all ranks meet, and the model may be judged or saved.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from labkit.gradients.updates.update import UpdateRule, replicas_only

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.experiment.problem import Problem
    from labkit.gradients.updates.update import UpdateContext


class AsyncUpdateRule(UpdateRule):
    """Base of these rules. The trainer asks in this order:

    open → (take → pull → passes → push)* → close → unite
    """

    uses_work_queue = True

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self._queue = WorkQueue(self.comm.size)

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why this rule cannot run here."""
        from labkit.experiment.problem import Problem

        yield from replicas_only(experiment)
        if experiment.training.loader_workers:
            reason = "loader processes prepare batches ahead, and here nobody knows ahead who takes which"
            yield Problem("training.loader_workers", reason, 0)

    def start_epoch(self, first: int, last: int) -> None:
        """A stretch of tickets begins (collective)."""
        self._queue.start_epoch(first, last)

    def average_replicas(self, step: int) -> None:
        """Between two stretches all ranks hold one set of weights; moments are those of rank 0 in a checkpoint."""

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Between two stretches all ranks hold one set of weights."""
        return nullcontext()

    def next_work(self, stop: bool) -> int | None:
        """The next ticket; None if the stretch is over, or if this rank is to `stop`."""
        return None if stop else self._queue.draw()

    def fetch_weights(self) -> None:
        """A pass begins: make the working module hold the weights that its gradient will belong to."""

    @abstractmethod
    def apply_gradient(self, work_item: int) -> int | None:
        """The gradient of the ticket is there: combine it. Returns its staleness in updates of the weights.

        None if the gradient came too late and was dropped; the ticket is drawn again then.
        """

    def close(self) -> None:
        """No rank takes another ticket of the stretch (collective): finish what is under way."""

    def sync_weights(self) -> None:
        """Let all ranks hold one set of weights where they are to be judged (collective); no part of an update."""

    @property
    def claimed_until(self) -> int:
        """Up to which ticket all have been drawn, equal on all ranks once the stretch is closed."""
        return self._queue.claimed_until


class WorkQueue:
    """Hands out tickets, each one once, through the store in which the ranks have met."""

    def __init__(self, world_size: int) -> None:
        self._store: Any = None
        self._stretch = 0
        self._first = self._last = 0
        self._ranks = world_size

    def start_epoch(self, first: int, last: int) -> None:
        """Hand out [first, last) from here on."""
        from torch.distributed import distributed_c10d

        self._store = distributed_c10d._get_default_store()
        self._stretch += 1
        self._first, self._last = first, last

    def draw(self) -> int | None:
        """The next ticket, None if there is none left."""
        work_item = self._first + int(self._store.add(self._key, 1)) - 1
        return work_item if work_item < self._last else None

    @property
    def claimed_until(self) -> int:
        """One more than the last ticket that was handed out."""
        return min(self._last, self._first + int(self._store.add(self._key, 0)))

    @property
    def _key(self) -> str:
        return f"tickets-{self._stretch}"
