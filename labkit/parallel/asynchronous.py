"""The asynchronous pipeline: no stage ever waits until an update is over everywhere.

PipeDream, Narayanan et al., SOSP 2019, section 3. A minibatch is one update. Stage s of S computes, in update t,

    forward of minibatch t + S-1-s, with its newest weights → backward of minibatch t → step on its newest weights

so S-s minibatches are under way there, all stages are busy, and there is no bubble. Between the two passes of a
minibatch the stage makes S-1-s updates: it steps with a gradient that is so many updates stale, w ← w - η·g(w of
S-1-s updates ago). That gradient is one at all only if the backward pass finds the weights of its forward pass. So the
weights move to new memory in each update and minibatches under way keep the old: S-1-s versions more (weight stashing).

A stale gradient is the gradient at old weights. With a horizon h the two passes of a minibatch use weights that are
predicted for the time at which the gradient arrives: w + h·a·(w - w of the update before), where a is the staleness
(linear weight prediction: Kosson et al. 2021, arXiv:2003.11666, who find h = 2 better than 1). It costs one version.

Evaluations, checkpoints, stops and the end find the pipeline empty: no minibatch is begun before that would end after.
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


class Supply:
    """Batches in their order; the first stage looks ahead in them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._seen: deque[Batch] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._seen.popleft() if self._seen else next(self._batches)

    def look(self, further: int) -> Batch:
        """The batch that comes after `further` others."""
        while len(self._seen) <= further:
            self._seen.append(next(self._batches))
        return self._seen[further]


@dataclass
class _UnderWay:
    """A minibatch between its two passes."""

    number: int
    x: Tensor
    out: Tensor
    """What the backward pass starts from: the output, on the last stage the loss."""
    weights: list[Tensor]
    version: int
    """Updates that had been made when these were the newest weights."""
    sent: Sent | None


class AsynchronousPipeline(Pipeline):
    """One stage of it. Of every update the trainer asks `begin`, `run`, `keep`, then the optimizer, then `updated`."""

    def __init__(
        self,
        modules: dict[int, nn.Module],
        layout: Layout,
        mesh: Mesh,
        device: torch.device,
        loss: Loss,
        stash: bool,
        horizon: float,
    ) -> None:
        super().__init__(modules, layout, mesh, device, loss)
        place, places = mesh.index("pp"), list(range(layout.pp))
        self.ahead = layout.pp - 1 - place
        """By how many minibatches the forward pass is ahead of the backward pass."""
        self.version = 0
        """Updates of the weights so far."""
        self.most_stashed = 0
        """Most bytes of stashed weights after an update, of those in which the timeline was kept."""
        self._stash, self._horizon = stash, horizon if stash else 0.0
        self._number = place
        self._module = modules[place]
        self._parameters = list(self._module.parameters())
        position = {parameter: at for at, parameter in enumerate(self._parameters)}
        self._slots = [
            (owner._parameters, name, position[parameter])
            for owner in self._module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        ]
        forth, back = mesh.along("pp", places), mesh.along("pp", places)
        assert forth is not None
        assert back is not None
        self._inputs = None if self.first else Inbox(forth, place - 1, device)
        self._outputs = None if self.last else Outbox(forth, place + 1)
        self._gradients = None if self.last else Inbox(back, place + 1, device)
        self._gradients_out = None if self.first else Outbox(back, place - 1)
        self._gradient_sent: Sent | None = None
        self._supply = Supply(iter(()))
        self._under_way: deque[_UnderWay] = deque()
        self._update = self._until = 0
        self._next = 0
        """The minibatch whose forward pass comes next."""
        self._newest: list[Tensor] | None = None
        self._before: list[Tensor] | None = None
        """The weights before the last update, if anything is to be predicted from them."""
        self._used = 0

    # -- one update ---------------------------------------------------------------------------------------------------

    def supply(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, to be drawn by the trainer; from here on the first stage looks ahead in them."""
        self._supply = Supply(batches)
        return self._supply

    def begin(self, update: int, until: int) -> None:
        """Update number `update` begins, its batch has been drawn; after `until` updates the pipeline has to be empty.

        `until` may come closer from update to update, but all stages have to be told `pp` updates before.
        """
        self._update, self._until = update, until
        if not self._under_way:
            self._next, self._before = update, None
        further = self._newly.stop - update - 1
        if self.first and further:
            self._supply.look(further - 1)  # now, so that fetching counts as such

    @property
    def _newly(self) -> range:
        """Minibatches begun in this update: several when the pipeline fills, none when it empties."""
        return range(self._next, min(self._update + self.ahead + 1, self._until))

    def run(self, x: Tensor, samples: int) -> list[Tensor]:
        """The forward and the backward passes of this update; the loss on the last stage."""
        newly = self._newly
        for number in newly:
            self._forward(number, x, samples)
        self._next = newly.stop
        loss = [self._under_way[0].out.detach()] if self.last else []
        self._backward()
        return loss

    def keep(self) -> None:
        """The optimizer is about to change the weights: minibatches under way keep those that they have seen."""
        seen = bool(self._under_way) and self._under_way[-1].version == self.version
        predicts = self._horizon > 0 and self.ahead > 0 and self._next < self._until
        self._before = [parameter.data for parameter in self._parameters] if predicts else None
        if predicts or (seen and self._stash):
            for parameter in self._parameters:
                if parameter.requires_grad:
                    parameter.data = parameter.data.clone()

    def updated(self) -> int:
        """The optimizer has stepped. Returns the staleness of the gradient that it used, in updates."""
        stale = self.version - self._used
        self.version += 1
        if self.timeline.actions is not None:
            self.most_stashed = max(self.most_stashed, self._stashed_bytes())
        self._newest = None
        return stale

    def finish(self) -> None:
        """Nothing is under way: wait until all that was sent has left."""
        if self._gradient_sent is not None:
            self._gradient_sent.wait()

    def _stashed_bytes(self) -> int:
        """Memory of weights beside the newest ones: for minibatches under way, and to predict from."""
        live = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}
        kept = {}
        for weights in (self._before or [], *(one.weights for one in self._under_way)):
            for weight in weights:
                storage = weight.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
        return sum(size for address, size in kept.items() if address not in live)

    # -- one minibatch ------------------------------------------------------------------------------------------------

    def _forward(self, number: int, x: Tensor, samples: int) -> None:
        if self._inputs is not None:
            x = self._inputs.take().requires_grad_()
            if number + 1 < self._until:
                self._inputs.expect()
        elif number > self._update:
            x = self._supply.look(number - self._update - 1)["x"]
        weights = self._weights(age=number - self._update)

        def compute() -> Tensor:
            with self._holding(weights):
                out: Tensor = self._module(x)
            return self._loss(out, torch.arange(samples, device=self._device)) if self.last else out

        out = self.timeline.timed("F", self._number, number, compute)
        sent = None if self._outputs is None else self._outputs.send(out.detach())
        self._under_way.append(_UnderWay(number, x, out, weights, self.version, sent))

    def _backward(self) -> None:
        one = self._under_way.popleft()
        assert one.number == self._update
        gradient = None
        if self._gradients is not None:
            gradient = self._gradients.take()
            if one.number + 1 < self._until:
                self._gradients.expect()
        if one.sent is not None:
            one.sent.wait()  # its gradient has come back, so it has arrived

        def compute() -> None:
            with self._holding(one.weights):  # what is computed again (activation checkpointing) needs them too
                torch.autograd.backward(one.out, gradient)

        self.timeline.timed("B", self._number, one.number, compute)
        self._used = one.version
        if self._gradients_out is not None:
            assert one.x.grad is not None
            if self._gradient_sent is not None:
                self._gradient_sent.wait()
            self._gradient_sent = self._gradients_out.send(one.x.grad)

    def _weights(self, age: int) -> list[Tensor]:
        """The weights for a minibatch whose gradient will be so stale: the newest ones, or those predicted for then.

        They are tensors of their own whose gradients are those of the parameters. The newest ones lie in the memory of
        the parameters, which autograd does not know: it would refuse a backward pass through weights that were changed
        in place meanwhile. With stashing nobody changes them, without it nobody notices.
        """
        if age and self._before is not None:
            return [
                _standing_for(parameter, before.lerp(parameter.data, 1 + self._horizon * age))
                for parameter, before in zip(self._parameters, self._before, strict=True)
            ]
        if self._newest is None:
            self._newest = [_standing_for(parameter, parameter.data) for parameter in self._parameters]
        return self._newest

    @contextmanager
    def _holding(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Meanwhile the stage computes with these weights."""
        for owned, name, at in self._slots:
            owned[name] = weights[at]  # type: ignore[assignment]
        try:
            yield
        finally:
            for owned, name, at in self._slots:
                owned[name] = self._parameters[at]


def _standing_for(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """`value`, in the place of the parameter."""
    if not parameter.requires_grad:
        return parameter
    value.requires_grad_()
    value.grad = parameter.grad
    return value
