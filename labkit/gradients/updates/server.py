"""The server's side of the parameter server (parameter_server.py): who has to wait, and what an update is made of.

Everything happens under one lock: a thread receives what other ranks bring, the rank that the server lives in comes by
itself. Answers leave without waiting for their arrival.
"""

from __future__ import annotations

import heapq
import math
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.gradients.updates.average import flatten, trainable_weights
from labkit.gradients.updates.gradient_vector import GradientVector
from labkit.gradients.updates.update import UpdateContext
from labkit.gradients.wire import Communicator, PendingWork

NONE_LEFT = -1
_ASK, _PUSH, _LEAVE = 0, 1, 2
_HEAD, _GRADIENT, _ANSWER, _WEIGHTS = 1, 2, 3, 4
"""Tags of the messages."""
HEAD_BYTES, ANSWER_BYTES = 24, 32
"""What stands before a gradient, and before weights."""


def size_of(model: nn.Module) -> int:
    """Bytes of its trained weights."""
    return sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)


@dataclass
class Reply:
    """What a rank gets: weights, which version of them, a ticket, and what became of the gradient that it brought."""

    weights: Tensor
    version: int
    work_item: int
    staleness: int = 0
    dropped: bool = False


@dataclass
class PendingGradient:
    """A gradient that waits to be used."""

    rank: int
    work_item: int
    version: int
    """Of the weights that it belongs to."""
    gradient: Tensor


class Server:
    """Keeps the weights: those of the model of its rank, changed by its optimizer."""

    def __init__(self, context: UpdateContext, comm: Communicator) -> None:
        self.context, self.options, self.comm = context, context.options, comm
        self.version = 0
        """Updates of the weights so far."""
        self._model, self._optimizer = context.model, context.optimizer
        self._noisier = context.experiment.optimizer.name == "adamw"
        self._lower_momentum()
        self._gradients = GradientVector(context.model, context.irregular)
        self.changed = threading.Condition()
        """Held while anything changes, the counters too."""
        self._computing: dict[int, int] = {}
        """Rank to the version of the weights that it computes with."""
        self._waiting: list[PendingGradient] = []
        self._for_own_rank: Reply | None = None
        self._on_the_way: list[PendingWork] = []
        self.answers = 0
        """Sent so far."""
        self._failure: BaseException | None = None

    @property
    def formula_bytes(self) -> int:
        """Of all answers to other ranks so far."""
        return self.answers * (ANSWER_BYTES + size_of(self._model))

    def _lower_momentum(self) -> None:
        """Stale updates are momentum enough."""
        wanted, own = self.options.momentum, self.context.experiment.optimizer.momentum
        if wanted is None:
            wanted = own if self.options.staleness == 0 else max(0.0, own - (1 - 1 / self.comm.size))
        for group in self._optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (wanted, group["betas"][1])
            else:
                group["momentum"] = wanted

    def start_epoch(self, first: int, last: int) -> None:
        """Hand out tickets [first, last)."""
        self._next, self._last = first, last
        self._returned: list[int] = []
        """Handed out and given back, the lowest first."""
        # Whoever has not come yet counts as computing, so that nobody is used without it where all have to wait.
        self._computing = dict.fromkeys(range(self.comm.size), self.version)
        self._thread = threading.Thread(target=self._listen, name="labkit-server", daemon=True)
        self._thread.start()

    def close(self) -> int:
        """Wait until all ranks have gone; returns up to which ticket all are done."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        for pending in self._on_the_way:
            pending.wait()
        self._on_the_way.clear()
        return min([*self._returned, self._next])

    def _listen(self) -> None:
        head = torch.zeros(3, dtype=torch.int64)
        gradient = self._gradients.empty()
        present = self.comm.size - 1
        try:
            while present:
                rank = self.comm.receive_from_any(head, _HEAD)
                kind, work_item, version = head.tolist()
                if kind == _PUSH:
                    self.comm.receive(gradient, rank, _GRADIENT).wait()
                self.handle(rank, kind, work_item, version, gradient.clone() if kind == _PUSH else None)
                present -= kind == _LEAVE
        except BaseException as error:
            with self.changed:
                self._failure = error
                self.changed.notify_all()

    def handle(
        self, rank: int, kind: int, work_item: int = 0, version: int = 0, gradient: Tensor | None = None
    ) -> None:
        """A rank asks for its first ticket, brings a gradient, or leaves and gives back the ticket that it has."""
        with self.changed:
            self._computing.pop(rank, None)
            if kind == _ASK:
                self._answer(rank)
            elif kind == _LEAVE:
                if work_item != NONE_LEFT:
                    self._give_back(work_item)
            elif gradient is not None and self._bound is not None and self.version - version > self._bound:
                self._give_back(work_item)  # too late: only with backup workers
                self._answer(rank, self.version - version, dropped=True)
            elif gradient is not None:
                self._waiting.append(PendingGradient(rank, work_item, version, gradient))
            self._proceed()

    def _give_back(self, work_item: int) -> None:
        heapq.heappush(self._returned, work_item)

    def _draw(self) -> int:
        """The lowest ticket that nobody has."""
        if self._returned:
            return heapq.heappop(self._returned)
        if self._next == self._last:
            return NONE_LEFT
        self._next += 1
        return self._next - 1

    @property
    def _bound(self) -> int | None:
        return None if self.options.staleness < 0 else int(self.options.staleness)

    def _proceed(self) -> None:
        """Use what may be used."""
        while self._waiting:
            world_size = self.comm.size - self.options.backup
            if not self._computing or (self.options.backup and len(self._waiting) >= world_size):
                # Nobody is left to wait for, or enough are here. (With a bound of 0, this is the only way.)
                self._update(sorted(self._waiting, key=lambda one: one.work_item))
                continue
            free = next((one for one in self._waiting if self._can_apply_alone(one)), None)
            if free is None:
                return
            self._update([free])

    def _can_apply_alone(self, one: PendingGradient) -> bool:
        if self._bound is None:
            return True
        others = [*self._computing.values(), *(other.version for other in self._waiting if other is not one)]
        return all(self.version + 1 - version <= self._bound for version in others)

    def _update(self, used: list[PendingGradient]) -> None:
        """One update with the weighted mean of these gradients; then their ranks get the new weights."""
        ages = [self.version - one.version for one in used]
        weights = [1 / (1 + age) if self.options.scaled else 1.0 for age in ages]
        mean = torch.zeros_like(used[0].gradient)
        for one, weight in zip(used, weights, strict=True):
            mean.add_(one.gradient, alpha=weight / sum(weights))
        # With backup workers the gradients that came stand for all.
        part = 1.0 if self.options.backup else sum(weights) / self.comm.size
        if self._noisier and not self.options.backup:
            part *= math.sqrt(self.comm.size / len(used))
        rate = self.context.lr_at(min(one.work_item for one in used) // self.comm.size)
        self._gradients.write(mean)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * part
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.version += 1
        for one, age in zip(used, ages, strict=True):
            self._waiting.remove(one)
            self._answer(one.rank, age)

    def _answer(self, rank: int, staleness: int = 0, dropped: bool = False) -> None:
        """Send the weights as they are now, and the next ticket."""
        work_item = self._draw()
        answer = Reply(flatten(trainable_weights(self._model)).cpu(), self.version, work_item, staleness, dropped)
        if work_item != NONE_LEFT:
            self._computing[rank] = self.version
        if rank == self.comm.rank:
            self._for_own_rank = answer
            self.changed.notify_all()
            return
        head = torch.tensor([work_item, self.version, staleness, int(dropped)])
        self._on_the_way = [one for one in self._on_the_way if not one.done()]
        self.answers += 1
        self._on_the_way += [self.comm.send(head, rank, _ANSWER), self.comm.send(answer.weights, rank, _WEIGHTS)]

    def wait_for_local_reply(self) -> Reply:
        """Wait for the answer to the rank that the server lives in."""
        with self.changed:
            while self._for_own_rank is None and self._failure is None:
                self.changed.wait()
            if self._failure is not None:
                raise self._failure
            answer, self._for_own_rank = self._for_own_rank, None
            assert answer is not None
            return answer


class LocalClient:
    """The way to the server from its own rank."""

    def __init__(self, server: Server) -> None:
        self._server = server

    @property
    def formula_bytes(self) -> int:
        """What answers to others come to."""
        return self._server.formula_bytes

    def counters_locked(self) -> AbstractContextManager[Any]:
        """Meanwhile no answer leaves, which goes in two pieces."""
        return self._server.changed

    def ask(self) -> Reply:
        """For weights and a first ticket."""
        self._server.handle(self._server.comm.rank, _ASK)
        return self._server.wait_for_local_reply()

    def push(self, held: Reply, gradient: Tensor) -> Reply:
        """Bring the gradient for the ticket that is held."""
        self._server.handle(self._server.comm.rank, _PUSH, held.work_item, held.version, gradient)
        return self._server.wait_for_local_reply()

    def leave(self, held: Reply) -> None:
        """Take leave; a ticket that is held goes back."""
        self._server.handle(self._server.comm.rank, _LEAVE, held.work_item)


class RemoteClient:
    """The way to the server from another rank."""

    def __init__(self, comm: Communicator, model: nn.Module, gradient_bytes: int) -> None:
        self._comm = comm
        self._weights = torch.empty_like(flatten(trainable_weights(model)), device="cpu")
        self._gradient_bytes = gradient_bytes
        self.formula_bytes = 0
        """What it has said and brought so far."""

    def counters_locked(self) -> AbstractContextManager[Any]:
        """Nobody else sends from here."""
        return nullcontext()

    def ask(self) -> Reply:
        """For weights and a first ticket."""
        self._head(_ASK)
        return self._receive()

    def push(self, held: Reply, gradient: Tensor) -> Reply:
        """Bring the gradient for the ticket that is held."""
        self._head(_PUSH, held.work_item, held.version)
        self.formula_bytes += self._gradient_bytes
        self._comm.send(gradient, 0, _GRADIENT).wait()
        return self._receive()

    def leave(self, held: Reply) -> None:
        """Take leave; a ticket that is held goes back."""
        self._head(_LEAVE, held.work_item)

    def _head(self, *numbers: int) -> None:
        message: Any = torch.zeros(3, dtype=torch.int64)
        message[: len(numbers)] = torch.tensor(numbers)
        self.formula_bytes += HEAD_BYTES
        self._comm.send(message, 0, _HEAD).wait()

    def _receive(self) -> Reply:
        head = torch.zeros(4, dtype=torch.int64)
        self._comm.receive(head, 0, _ANSWER).wait()
        self._comm.receive(self._weights, 0, _WEIGHTS).wait()
        work_item, version, staleness, dropped = head.tolist()
        return Reply(self._weights, version, work_item, staleness, bool(dropped))
