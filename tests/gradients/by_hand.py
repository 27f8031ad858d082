"""Update rules written once more, the plain way: all ranks in one process, one after the other. The oracle of tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from labkit.experiment import Experiment
from labkit.experiment.registry import registry
from labkit.training.optimizers import learning_rate, make_optimizer, set_learning_rate
from labkit.training.sampling import BatchOrder

Flat = torch.Tensor


class Rank:
    """A model, its optimizer, and its share of every batch."""

    def __init__(self, experiment: Experiment, place: int) -> None:
        workload = registry("workload")[experiment.workload.name].load()
        options = workload.Options(**experiment.workload.options)
        self.task = workload.build(options, experiment.training.seed)
        self.model = self.task.model.double()
        self.experiment, self.place = experiment, place
        pairs = [(parameter, parameter.dim() > 1) for parameter in self.model.parameters()]
        self.optimizer = make_optimizer(experiment.optimizer, pairs)
        self.order = BatchOrder(len(self.task.train), experiment.training.global_batch, experiment.training.seed)

    def gradient(self, step: int) -> float:
        """Leaves the gradient of its share, weighted so that the mean over ranks is the batch's; returns the loss."""
        batch_size, ranks = self.experiment.training.global_batch, self.experiment.layout.world_size
        indices = self.order.micro_batches(step, self.place, ranks, 1)[0].tolist()
        batch = {
            name: value.double() if value.is_floating_point() else value
            for name, value in self.task.train.__getitems__(indices).items()
        }
        torch.manual_seed((self.experiment.training.seed * 1_000_003 + step) * 4099 + self.place)
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(batch["x"]), batch)
        (loss * len(indices) * ranks / batch_size).backward()
        return float(loss.detach()) * len(indices) / batch_size

    def step(self, step: int) -> None:
        set_learning_rate(self.optimizer, learning_rate(self.experiment.optimizer, step, self.steps))
        self.optimizer.step()

    @property
    def steps(self) -> int:
        return self.experiment.training.steps or 0

    @property
    def weights(self) -> Flat:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.model.parameters()])

    @weights.setter
    def weights(self, values: Flat) -> None:
        torch.nn.utils.vector_to_parameters(values.clone(), self.model.parameters())

    @property
    def slope(self) -> Flat:
        return torch.cat([p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None])

    @slope.setter
    def slope(self, values: Flat) -> None:
        begin = 0
        for parameter in self.model.parameters():
            parameter.grad = values[begin : begin + parameter.numel()].view(parameter.shape).clone()
            begin += parameter.numel()


def mean(values: list[Flat]) -> Flat:
    return torch.stack(values).mean(0)


def losses(experiment: Experiment, rule: Callable[[list[Rank], int], Any]) -> np.ndarray[Any, Any]:
    """The loss of every update; `rule(ranks, step)` is called when the gradients of all ranks are there."""
    torch.set_num_threads(1)
    ranks = [Rank(experiment, place) for place in range(experiment.layout.world_size)]
    found = []
    for step in range(experiment.training.steps or 0):
        if isinstance(rule, Late):
            rule.before(ranks)
        found.append(sum(rank.gradient(step) for rank in ranks))
        rule(ranks, step)
    return np.array(found)


def local_sgd(every: int) -> Callable[[list[Rank], int], None]:
    def rule(ranks: list[Rank], step: int) -> None:
        for rank in ranks:
            rank.step(step)
        if (step + 1) % every == 0:
            together = mean([rank.weights for rank in ranks])
            for rank in ranks:
                rank.weights = together

    return rule


class Late:
    """Gradients that are applied `delay` updates later; `ahead`: computed where the weights will be by then."""

    def __init__(self, delay: int, ahead: float) -> None:
        self.delay, self.under_way, self.way, self.ahead = delay, list[Flat](), 0.0, ahead

    def before(self, ranks: list[Rank]) -> None:
        self.here = ranks[0].weights
        for rank in ranks:
            rank.weights = self.here + self.way

    def __call__(self, ranks: list[Rank], step: int) -> None:
        for rank in ranks:
            rank.weights = self.here
        self.under_way.append(mean([rank.slope for rank in ranks]))
        if len(self.under_way) > self.delay:
            old = self.under_way.pop(0)
            for rank in ranks:
                rank.slope = old
                rank.step(step)
        if self.ahead:
            self.way = self.ahead * self.delay * (ranks[0].weights - self.here)


def delayed(delay: int, ahead: float = 0.0) -> Late:
    return Late(delay, ahead)


def diloco(every: int, lr: float, momentum: float) -> Callable[[list[Rank], int], None]:
    """With torch's own Nesterov SGD as the outer optimizer."""
    anchor: list[torch.nn.Parameter] = []
    outer: list[torch.optim.SGD] = []

    def rule(ranks: list[Rank], step: int) -> None:
        if not anchor:
            anchor.append(torch.nn.Parameter(ranks[0].weights))
            outer.append(torch.optim.SGD(anchor, lr=lr, momentum=momentum, nesterov=True))
        for rank in ranks:
            rank.step(step)
        if (step + 1) % every == 0:
            anchor[0].grad = anchor[0].detach() - mean([rank.weights for rank in ranks])
            outer[0].step()
            for rank in ranks:
                rank.weights = anchor[0].detach()

    return rule


def streaming(every: int, fragments: int, delay: int, alpha: float, lr: float, momentum: float) -> Any:
    """Fragment p leaves after updates p·H/P + H, + 2·H, … and arrives `delay` updates later."""
    state: dict[str, Any] = {}

    def rule(ranks: list[Rank], step: int) -> None:
        if not state:
            state["anchor"] = ranks[0].weights
            state["velocity"] = torch.zeros_like(state["anchor"])
            state["under way"] = []
        for rank in ranks:
            rank.step(step)
        done = step + 1
        arrived = [one for one in state["under way"] if one[0] == done]
        state["under way"] = [one for one in state["under way"] if one[0] != done]
        length = len(state["anchor"])
        for _, part, slope in arrived:
            here = slice(length * part // fragments, length * (part + 1) // fragments)
            state["velocity"][here] = momentum * state["velocity"][here] + slope
            state["anchor"][here] -= lr * (slope + momentum * state["velocity"][here])
            for rank in ranks:
                values = rank.weights
                values[here] = alpha * values[here] + (1 - alpha) * state["anchor"][here]
                rank.weights = values
        for part in range(fragments):
            turn = done - every * part // fragments
            if turn > 0 and turn % every == 0:
                here = slice(length * part // fragments, length * (part + 1) // fragments)
                slope = state["anchor"][here] - mean([rank.weights for rank in ranks])[here]
                state["under way"].append((done + delay, part, slope))

    return rule
