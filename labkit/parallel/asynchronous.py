"""The asynchronous pipeline: no stage ever waits until an update is over everywhere.

PipeDream, Narayanan et al., SOSP 2019, section 3. A minibatch is one update. Stage s of S computes, in update t,

    forward of minibatch t + S-1-s, with its newest weights → backward of minibatch t → step on its newest weights

so S-s minibatches are in flight there, all stages are busy, and there is no bubble. Between the two passes of a
minibatch the stage makes S-1-s updates: it steps with a gradient that is S-1-s updates stale, w ← w - η·g(w of S-1-s
updates ago). It is a gradient at all only if the backward pass uses the weights of its forward pass. So the weights
move to new memory in each update and minibatches in flight keep the old: S-1-s further versions (weight stashing).

A stale gradient is the gradient at old weights. With a horizon h the two passes of a minibatch use weights that are
predicted for the time at which the gradient arrives: w + h·a·(w - w of the update before), where a is the staleness
(linear weight prediction: Kosson et al. 2021, arXiv:2003.11666, who find h = 2 better than 1). It costs one version.

The pipeline is empty at evaluations, checkpoints, stops and the end: no minibatch begins before one of them that would
end after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.experiment.layout import Layout
from labkit.parallel.links import Inbox, Outbox, Sent
from labkit.parallel.mesh import Mesh
from labkit.parallel.pipeline import Loss, Pipeline
from labkit.workloads.base import Batch


class LookaheadBatches:
    """An iterator over batches in which the first stage can look ahead."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._fetched: deque[Batch] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._fetched.popleft() if self._fetched else next(self._batches)

    def peek(self, offset: int) -> Batch:
        """Return the batch that comes `offset` batches after the next one, without consuming any."""
        while len(self._fetched) <= offset:
            self._fetched.append(next(self._batches))
        return self._fetched[offset]


@dataclass
class _InFlight:
    """A minibatch between its forward and its backward pass."""

    number: int
    x: Tensor
    out: Tensor
    """The tensor from which the backward pass starts: the output, on the last stage the loss."""
    weights: list[Tensor]
    """The weights of its forward pass."""
    version: int
    """Number of updates that had been made when these were the newest weights."""
    sent: Sent | None
    """The message that carries the output to the next stage."""


class AsynchronousPipeline(Pipeline):
    """One stage of the asynchronous pipeline.

    For every update the trainer calls `begin_update`, `run` and `stash_weights`, then steps the optimizer, then calls
    `finish_update`.
    """

    def __init__(
        self, modules: dict[int, nn.Module], layout: Layout, mesh: Mesh, device: torch.device, loss: Loss
    ) -> None:
        super().__init__(modules, layout, mesh, device, loss)
        pp_rank, pp_ranks = mesh.index("pp"), list(range(layout.pp))
        self.ahead = layout.pp - 1 - pp_rank
        """Number of minibatches by which the forward pass is ahead of the backward pass."""
        self.version = 0
        """Number of updates of the weights so far."""
        self.max_stashed_bytes = 0
        """Largest number of bytes of stashed weights after an update, over the updates with a recorded timeline."""
        self._stash = layout.weight_stashing
        self._horizon = layout.weight_prediction if layout.weight_stashing else 0.0
        self._number = pp_rank
        self._module = modules[pp_rank]
        self._parameters = list(self._module.parameters())
        position = {parameter: index for index, parameter in enumerate(self._parameters)}
        self._slots = [
            (owner._parameters, name, position[parameter])
            for owner in self._module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        ]
        forward_group, backward_group = mesh.new_group_along("pp", pp_ranks), mesh.new_group_along("pp", pp_ranks)
        assert forward_group is not None
        assert backward_group is not None
        self._inputs = None if self.first else Inbox(forward_group, pp_rank - 1, device)
        self._outputs = None if self.last else Outbox(forward_group, pp_rank + 1)
        self._gradients = None if self.last else Inbox(backward_group, pp_rank + 1, device)
        self._gradients_out = None if self.first else Outbox(backward_group, pp_rank - 1)
        self._gradient_sent: Sent | None = None
        self._batches = LookaheadBatches(iter(()))
        self._in_flight: deque[_InFlight] = deque()
        self._update = self._until = 0
        self._next = 0
        """Number of the minibatch whose forward pass comes next."""
        self._newest: list[Tensor] | None = None
        """The newest weights as `_weights` returns them; None before they are needed."""
        self._before: list[Tensor] | None = None
        """The weights before the last update, if weights are predicted from them."""
        self._used_version = 0
        """Version of the weights of the minibatch whose backward pass came last."""

    # -- one update ---------------------------------------------------------------------------------------------------

    def wrap_dataloader(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Return the same batches for the trainer to draw; from now on the first stage looks ahead in them."""
        self._batches = LookaheadBatches(batches)
        return self._batches

    def begin_update(self, update: int, until: int) -> None:
        """Begin update number `update`, whose batch has been drawn; after `until` updates the pipeline must be empty.

        `until` may decrease from update to update, but all stages have to learn of it `pp` updates before.
        """
        self._update, self._until = update, until
        if not self._in_flight:
            self._next, self._before = update, None
        lookahead = self._to_begin.stop - update - 1
        if self.first and lookahead:
            self._batches.peek(lookahead - 1)  # now, so that it counts as loading time

    @property
    def _to_begin(self) -> range:
        """Numbers of the minibatches that begin in this update: several as the pipeline fills, none as it empties."""
        return range(self._next, min(self._update + self.ahead + 1, self._until))

    def run(self, x: Tensor, samples: int) -> list[Tensor]:
        """Run the forward passes and the backward pass of this update; return the loss on the last stage, else []."""
        to_begin = self._to_begin
        for number in to_begin:
            self._forward(number, x, samples)
        self._next = to_begin.stop
        loss = [self._in_flight[0].out.detach()] if self.last else []
        self._backward()
        return loss

    def stash_weights(self) -> None:
        """Before an optimizer step, move the weights to new memory if minibatches in flight still need the old."""
        in_use = bool(self._in_flight) and self._in_flight[-1].version == self.version
        predicts = self._horizon > 0 and self.ahead > 0 and self._next < self._until
        self._before = [parameter.data for parameter in self._parameters] if predicts else None
        if predicts or (in_use and self._stash):
            for parameter in self._parameters:
                if parameter.requires_grad:
                    parameter.data = parameter.data.clone()

    def finish_update(self) -> int:
        """Count the optimizer step; return the staleness, in updates, of the gradient that it used."""
        staleness = self.version - self._used_version
        self.version += 1
        if self.timeline.actions is not None:
            self.max_stashed_bytes = max(self.max_stashed_bytes, self._stashed_bytes())
        self._newest = None
        return staleness

    def wait_until_sent(self) -> None:
        """Wait until the last gradient has been sent, when no minibatch is in flight any more."""
        if self._gradient_sent is not None:
            self._gradient_sent.wait()

    def _stashed_bytes(self) -> int:
        """Return the bytes of all weights but the newest: those of minibatches in flight, and those to predict from."""
        newest = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}
        stashed = {}
        for weights in (self._before or [], *(minibatch.weights for minibatch in self._in_flight)):
            for weight in weights:
                storage = weight.untyped_storage()
                stashed[storage.data_ptr()] = storage.nbytes()
        return sum(size for address, size in stashed.items() if address not in newest)

    # -- one minibatch ------------------------------------------------------------------------------------------------

    def _forward(self, number: int, x: Tensor, samples: int) -> None:
        if self._inputs is not None:
            x = self._inputs.receive().requires_grad_()
            if number + 1 < self._until:
                self._inputs.start_receive()
        elif number > self._update:
            x = self._batches.peek(number - self._update - 1)["x"]
        weights = self._weights(staleness=number - self._update)

        def compute() -> Tensor:
            with self._use_weights(weights):
                out: Tensor = self._module(x)
            return self._loss(out, torch.arange(samples, device=self._device)) if self.last else out

        out = self.timeline.timed("F", self._number, number, compute)
        sent = None if self._outputs is None else self._outputs.send(out.detach())
        self._in_flight.append(_InFlight(number, x, out, weights, self.version, sent))

    def _backward(self) -> None:
        minibatch = self._in_flight.popleft()
        assert minibatch.number == self._update
        gradient = None
        if self._gradients is not None:
            gradient = self._gradients.receive()
            if minibatch.number + 1 < self._until:
                self._gradients.start_receive()
        if minibatch.sent is not None:
            minibatch.sent.wait()  # its gradient has come back, so it has arrived

        def compute() -> None:
            with self._use_weights(minibatch.weights):  # recomputation (activation checkpointing) needs them too
                torch.autograd.backward(minibatch.out, gradient)

        self.timeline.timed("B", self._number, minibatch.number, compute)
        self._used_version = minibatch.version
        if self._gradients_out is not None:
            assert minibatch.x.grad is not None
            if self._gradient_sent is not None:
                self._gradient_sent.wait()
            self._gradient_sent = self._gradients_out.send(minibatch.x.grad)

    def _weights(self, staleness: int) -> list[Tensor]:
        """Return the weights for a minibatch whose gradient will be `staleness` updates stale.

        They are the newest weights, or those predicted for the update in which the gradient arrives: separate tensors
        that share the gradients of the parameters. The newest ones also share the memory of the parameters, but
        autograd does not know this: it would refuse a backward pass through weights changed in place meanwhile. With
        stashing they are not changed in place; without it autograd does not notice the change.
        """
        if staleness and self._before is not None:
            return [
                _in_place_of(parameter, before.lerp(parameter.data, 1 + self._horizon * staleness))
                for parameter, before in zip(self._parameters, self._before, strict=True)
            ]
        if self._newest is None:
            self._newest = [_in_place_of(parameter, parameter.data) for parameter in self._parameters]
        return self._newest

    @contextmanager
    def _use_weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Context manager in which the stage computes with these weights."""
        for owned, name, index in self._slots:
            owned[name] = weights[index]  # type: ignore[assignment]
        try:
            yield
        finally:
            for owned, name, index in self._slots:
                owned[name] = self._parameters[index]


def _in_place_of(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return `value` prepared to replace the parameter in a forward pass: its gradient is the parameter's.

    A parameter that is not trained is returned itself.
    """
    if not parameter.requires_grad:
        return parameter
    value.requires_grad_()
    value.grad = parameter.grad
    return value
