"""Asynchronous update rules, in which nobody waits for the slowest: ranks take their work from a work queue.

Work item k is share k mod N of optimizer step k div N, of N shares: the same samples as in rounds of N ranks, but each
item goes to the rank that is free first. Items are handed out in epochs, [first, last); between two epochs all ranks
synchronise, and the model may be evaluated or saved.
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
    """Base class of asynchronous rules.

    The trainer calls their methods in this order:

    start_epoch → (next_work → fetch_weights → forward and backward → apply_gradient)* → close → sync_weights
    """

    uses_work_queue = True

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self._queue = WorkQueue(self.comm.size)

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why this rule cannot run here."""
        from labkit.experiment.problem import Problem

        yield from replicas_only(experiment)
        if experiment.training.loader_workers:
            reason = (
                "loader processes prepare batches ahead, but with a work queue a rank does not know which it will get"
            )
            yield Problem("training.loader_workers", reason, 0)

    def start_epoch(self, first: int, last: int) -> None:
        """Start an epoch of work items [first, last) (collective)."""
        self._queue.start_epoch(first, last)

    def average_replicas(self, step: int) -> None:
        """Do nothing: between two epochs all ranks hold the same weights; a checkpoint has the moments of rank 0."""

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Return a context manager that does nothing: between two epochs all ranks hold the same weights."""
        return nullcontext()

    def next_work(self, stop: bool) -> int | None:
        """Return the next work item; None if the epoch is over or this rank is to `stop`."""
        return None if stop else self._queue.next_work()

    def fetch_weights(self) -> None:
        """Load the weights at which the next gradient is computed into the training module."""

    @abstractmethod
    def apply_gradient(self, work_item: int) -> int | None:
        """Apply the gradient of a work item and return its staleness, in updates of the weights.

        Returns None if the gradient came too late and was dropped; its work item is then handed out again.
        """

    def close(self) -> None:
        """Finish what is in flight at the end of an epoch, when no rank takes another work item (collective)."""

    def sync_weights(self) -> None:
        """Give all ranks the same weights between two epochs, e.g. to evaluate them (collective)."""

    @property
    def claimed_until(self) -> int:
        """Index up to which all work items have been handed out; equal on all ranks after `close`."""
        return self._queue.claimed_until


class WorkQueue:
    """Hands out each work item once, through the store of the default process group."""

    def __init__(self, world_size: int) -> None:
        self._store: Any = None
        self._epoch = 0
        self._first = self._last = 0
        self._ranks = world_size

    def start_epoch(self, first: int, last: int) -> None:
        """Hand out the work items [first, last) from now on."""
        from torch.distributed import distributed_c10d

        self._store = distributed_c10d._get_default_store()
        self._epoch += 1
        self._first, self._last = first, last

    def next_work(self) -> int | None:
        """Return the next work item; None if none is left."""
        work_item = self._first + int(self._store.add(self._key, 1)) - 1
        return work_item if work_item < self._last else None

    @property
    def claimed_until(self) -> int:
        """Index after the last work item that was handed out."""
        return min(self._last, self._first + int(self._store.add(self._key, 0)))

    @property
    def _key(self) -> str:
        return f"tickets-{self._epoch}"
