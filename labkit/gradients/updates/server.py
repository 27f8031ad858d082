"""Server and clients of the parameter server (parameter_server.py): which gradients wait, and which make up an update.

The server handles every request under one lock: a thread receives those of other ranks, and the server's own rank
calls it directly. Replies are sent without waiting for their arrival.
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
"""Stands for a work item when none is left."""
_ASK, _SEND, _SIGN_OFF = 0, 1, 2
"""Kinds of requests."""
_HEADER, _GRADIENT, _REPLY, _WEIGHTS = 1, 2, 3, 4
"""Message tags."""
HEADER_BYTES, REPLY_BYTES = 24, 32
"""Sizes of the header of a request and of the header before the weights in a reply."""


def trainable_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's trainable weights."""
    return sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad
    )


@dataclass
class Reply:
    """Reply to a rank: weights and their version, a work item, and what became of the gradient that the rank sent."""

    weights: Tensor
    version: int
    work_item: int
    staleness: int = 0
    dropped: bool = False


@dataclass
class PendingGradient:
    """A gradient that waits to be applied."""

    rank: int
    work_item: int
    version: int
    """Version of the weights from which it was computed."""
    gradient: Tensor


class Server:
    """Keeps the weights, which are those of the model of its rank, and applies gradients with its optimizer."""

    def __init__(self, context: UpdateContext, comm: Communicator) -> None:
        self.context, self.options, self.comm = context, context.options, comm
        self.version = 0
        """Number of updates of the weights so far."""
        self._model, self._optimizer = context.model, context.optimizer
        self._adaptive = context.experiment.optimizer.name == "adamw"
        self._lower_momentum()
        self._gradients = GradientVector(context.model, context.irregular)
        self.condition = threading.Condition()
        """Held while anything changes, the counters included."""
        self._computing: dict[int, int] = {}
        """Version of the weights that each computing rank uses, by rank."""
        self._waiting: list[PendingGradient] = []
        self._local_reply: Reply | None = None
        self._sending: list[PendingWork] = []
        self.replies = 0
        """Number of replies sent so far."""
        self._failure: BaseException | None = None

    @property
    def formula_bytes(self) -> int:
        """Bytes of all replies to other ranks so far."""
        return self.replies * (REPLY_BYTES + trainable_bytes(self._model))

    def _lower_momentum(self) -> None:
        """Set the momentum as requested or, by default, lower than usual, since stale updates act like momentum."""
        momentum, optimizer = self.options.momentum, self.context.experiment.optimizer
        usual = optimizer.beta1 if optimizer.name == "adamw" else optimizer.momentum
        if momentum is None:
            momentum = usual if self.options.staleness == 0 else max(0.0, usual - (1 - 1 / self.comm.size))
        for group in self._optimizer.param_groups:
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            else:
                group["momentum"] = momentum

    def start_epoch(self, first: int, last: int) -> None:
        """Start to hand out work items [first, last)."""
        self._next, self._last = first, last
        self._returned: list[int] = []
        """Heap of the work items that were handed out and given back."""
        # A rank that has not asked yet counts as computing, so that a synchronous update waits for it too.
        self._computing = dict.fromkeys(range(self.comm.size), self.version)
        self._thread = threading.Thread(target=self._listen, name="labkit-server", daemon=True)
        self._thread.start()

    def close(self) -> int:
        """Wait until all ranks have signed off; return the index up to which all work items are done."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        for pending in self._sending:
            pending.wait()
        self._sending.clear()
        return min([*self._returned, self._next])

    def _listen(self) -> None:
        header = torch.zeros(3, dtype=torch.int64)
        gradient = self._gradients.empty()
        clients = self.comm.size - 1
        try:
            while clients:
                rank = self.comm.receive_from_any(header, _HEADER)
                kind, work_item, version = header.tolist()
                if kind == _SEND:
                    self.comm.receive(gradient, rank, _GRADIENT).wait()
                self.handle(rank, kind, work_item, version, gradient.clone() if kind == _SEND else None)
                clients -= kind == _SIGN_OFF
        except BaseException as error:
            with self.condition:
                self._failure = error
                self.condition.notify_all()

    def handle(
        self, rank: int, kind: int, work_item: int = 0, version: int = 0, gradient: Tensor | None = None
    ) -> None:
        """Handle a request of a rank: for a first work item, with a gradient, or to sign off and return a work item."""
        with self.condition:
            self._computing.pop(rank, None)
            if kind == _ASK:
                self._send_reply(rank)
            elif kind == _SIGN_OFF:
                if work_item != NONE_LEFT:
                    self._give_back(work_item)
            elif gradient is not None and self._bound is not None and self.version - version > self._bound:
                self._give_back(work_item)  # too late: only with backup workers
                self._send_reply(rank, self.version - version, dropped=True)
            elif gradient is not None:
                self._waiting.append(PendingGradient(rank, work_item, version, gradient))
            self._apply_ready()

    def _give_back(self, work_item: int) -> None:
        heapq.heappush(self._returned, work_item)

    def _take_work(self) -> int:
        """Take the lowest work item that no rank has."""
        if self._returned:
            return heapq.heappop(self._returned)
        if self._next == self._last:
            return NONE_LEFT
        self._next += 1
        return self._next - 1

    @property
    def _bound(self) -> int | None:
        return None if self.options.staleness < 0 else int(self.options.staleness)

    def _apply_ready(self) -> None:
        """Apply all waiting gradients that may be applied now."""
        while self._waiting:
            enough = self.comm.size - self.options.backup
            if not self._computing or (self.options.backup and len(self._waiting) >= enough):
                # No rank is left to wait for, or enough gradients are here. (With a bound of 0, this is the only way.)
                self._update(sorted(self._waiting, key=lambda pending: pending.work_item))
                continue
            applicable = next((pending for pending in self._waiting if self._can_apply_alone(pending)), None)
            if applicable is None:
                return
            self._update([applicable])

    def _can_apply_alone(self, candidate: PendingGradient) -> bool:
        if self._bound is None:
            return True
        versions = [
            *self._computing.values(),
            *(pending.version for pending in self._waiting if pending is not candidate),
        ]
        return all(self.version + 1 - version <= self._bound for version in versions)

    def _update(self, gradients: list[PendingGradient]) -> None:
        """Apply the weighted mean of these gradients, then send the new weights to their ranks."""
        ages = [self.version - pending.version for pending in gradients]
        weights = [1 / (1 + age) if self.options.scaled else 1.0 for age in ages]
        mean = torch.zeros_like(gradients[0].gradient)
        for pending, weight in zip(gradients, weights, strict=True):
            mean.add_(pending.gradient, alpha=weight / sum(weights))
        # With backup workers the first gradients represent those of all ranks.
        factor = 1.0 if self.options.backup else sum(weights) / self.comm.size
        if self._adaptive and not self.options.backup:
            factor *= math.sqrt(self.comm.size / len(gradients))
        lr = self.context.lr_at(min(pending.work_item for pending in gradients) // self.comm.size)
        self._gradients.write(mean)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * factor
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.version += 1
        for pending, age in zip(gradients, ages, strict=True):
            self._waiting.remove(pending)
            self._send_reply(pending.rank, age)

    def _send_reply(self, rank: int, staleness: int = 0, dropped: bool = False) -> None:
        """Send the current weights and the next work item to a rank."""
        work_item = self._take_work()
        reply = Reply(flatten(trainable_weights(self._model)).cpu(), self.version, work_item, staleness, dropped)
        if work_item != NONE_LEFT:
            self._computing[rank] = self.version
        if rank == self.comm.rank:
            self._local_reply = reply
            self.condition.notify_all()
            return
        header = torch.tensor([work_item, self.version, staleness, int(dropped)])
        self._sending = [message for message in self._sending if not message.is_completed()]
        self.replies += 1
        self._sending += [self.comm.send(header, rank, _REPLY), self.comm.send(reply.weights, rank, _WEIGHTS)]

    def wait_for_local_reply(self) -> Reply:
        """Wait for the reply to the server's own rank."""
        with self.condition:
            while self._local_reply is None and self._failure is None:
                self.condition.wait()
            if self._failure is not None:
                raise self._failure
            reply, self._local_reply = self._local_reply, None
            assert reply is not None
            return reply


class LocalClient:
    """In-process client on the server's own rank."""

    def __init__(self, server: Server) -> None:
        self._server = server

    @property
    def formula_bytes(self) -> int:
        """Bytes of the replies to all other ranks, which this rank sends."""
        return self._server.formula_bytes

    def counters_locked(self) -> AbstractContextManager[Any]:
        """Return a context manager in which no reply is sent, since a reply consists of two messages."""
        return self._server.condition

    def ask(self) -> Reply:
        """Request the weights and a first work item."""
        self._server.handle(self._server.comm.rank, _ASK)
        return self._server.wait_for_local_reply()

    def send_gradient(self, reply: Reply, gradient: Tensor) -> Reply:
        """Send the gradient for the work item of `reply` and return the next reply."""
        self._server.handle(self._server.comm.rank, _SEND, reply.work_item, reply.version, gradient)
        return self._server.wait_for_local_reply()

    def sign_off(self, reply: Reply) -> None:
        """Sign off and give back the work item of `reply`, if it has one."""
        self._server.handle(self._server.comm.rank, _SIGN_OFF, reply.work_item)


class RemoteClient:
    """Client on another rank than the server's."""

    def __init__(self, comm: Communicator, model: nn.Module, gradient_bytes: int) -> None:
        self._comm = comm
        self._weights = torch.empty_like(flatten(trainable_weights(model)), device="cpu")
        self._gradient_bytes = gradient_bytes
        self.formula_bytes = 0
        """Bytes that this client has sent, by formula."""

    def counters_locked(self) -> AbstractContextManager[Any]:
        """Return a context manager that does nothing: only the calling thread sends from here."""
        return nullcontext()

    def ask(self) -> Reply:
        """Request the weights and a first work item."""
        self._send_header(_ASK)
        return self._receive()

    def send_gradient(self, reply: Reply, gradient: Tensor) -> Reply:
        """Send the gradient for the work item of `reply` and return the next reply."""
        self._send_header(_SEND, reply.work_item, reply.version)
        self.formula_bytes += self._gradient_bytes
        self._comm.send(gradient, 0, _GRADIENT).wait()
        return self._receive()

    def sign_off(self, reply: Reply) -> None:
        """Sign off and give back the work item of `reply`, if it has one."""
        self._send_header(_SIGN_OFF, reply.work_item)

    def _send_header(self, *numbers: int) -> None:
        message: Any = torch.zeros(3, dtype=torch.int64)
        message[: len(numbers)] = torch.tensor(numbers)
        self.formula_bytes += HEADER_BYTES
        self._comm.send(message, 0, _HEADER).wait()

    def _receive(self) -> Reply:
        header = torch.zeros(4, dtype=torch.int64)
        self._comm.receive(header, 0, _REPLY).wait()
        self._comm.receive(self._weights, 0, _WEIGHTS).wait()
        work_item, version, staleness, dropped = header.tolist()
        return Reply(self._weights, version, work_item, staleness, bool(dropped))
