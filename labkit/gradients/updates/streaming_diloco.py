"""Streaming DiLoCo: DiLoCo by fragments, one at a time, while the ranks continue to train (Douillard et al., 2025).

The weights are cut into P fragments of about one size; each is averaged every H steps, and their turns are H/P steps
apart, so at most 1/P of the weights is sent at once. The average of a fragment may take `delay` steps; then the rank
blends what the outer optimizer made of the fragment with its current weights:  w ← α·w + (1-α)·anchor.

One fragment, no delay and α = 0 is DiLoCo. Which state is local and which is averaged: see diloco.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from labkit.experiment.problem import Problem
from labkit.gradients.updates.diloco import DiLoCo
from labkit.gradients.updates.update import replicas_only

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.gradients.updates.update import UpdateContext


@dataclass
class Fragment:
    """A slice of the flat weights, and its reduction while one is in flight."""

    begin: int
    end: int
    offset: int
    """Its turn comes when (steps done - offset) is a multiple of H."""
    arrives: int = -1
    """Number of steps done when the reduction in flight is to be applied."""
    finish: Callable[[], Tensor] | None = None
    """Waits for the reduction in flight and returns the mean; None if there is none."""


class StreamingDiLoCo(DiLoCo):
    """Applies DiLoCo to one fragment of the weights at a time, overlapped with training."""

    class Options(DiLoCo.Options):
        bits: Literal[32, 16, 8, 4] = 4
        """Bits in which each value of the outer gradient is sent."""
        fragments: int = Field(default=2, ge=1, le=1000)
        """Number of fragments of the weights (P)."""
        delay: int = Field(default=1, ge=0, le=1000)
        """Steps after which the average of a fragment is applied."""
        alpha: float = Field(default=0.5, ge=0, lt=1)
        """Weight of a rank's own values when the average of a fragment is applied; the average has 1 - alpha."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.max_step_skew += self.options.delay  # a fragment is waited for that much later

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        yield from replicas_only(experiment)
        update: Any = experiment.gradients.update
        if update.fragments > update.every:
            reason = f"{update.fragments} fragments cannot take turns within {update.every} updates"
            yield Problem("gradients.update.fragments", reason, update.every)
        if update.delay >= update.every:
            reason = (
                f"the average of a fragment must be applied before the next one starts, after {update.every} updates"
            )
            yield Problem("gradients.update.delay", reason, update.every - 1)

    def load(self, state: dict[str, Tensor]) -> None:
        """Create the outer optimizer and the fragments, or restore the optimizer from a checkpoint."""
        super().load(state)
        length, count, every = self.outer.anchor.numel(), self.options.fragments, self.options.every
        borders = [length * index // count for index in range(count + 1)]
        self.fragments = [
            Fragment(begin, end, every * index // count) for index, (begin, end) in enumerate(pairwise(borders))
        ]

    def after_update(self, step: int) -> int | None:
        """Apply the averages that are due and start those whose turn it is; after the last step, average everything."""
        from labkit.gradients.updates.average import average, average_bytes, floating_buffers

        done = step + 1
        for fragment in self.fragments:
            if fragment.finish is not None and done >= fragment.arrives:
                self._apply(fragment, self.options.alpha)
        due = [
            fragment
            for fragment in self.fragments
            if done > fragment.offset and (done - fragment.offset) % self.options.every == 0
        ]
        for fragment in due:
            self._start(fragment, done)
            if not self.options.delay:
                self._apply(fragment, self.options.alpha)
        if done == self.context.steps:
            self._apply_all()
            for fragment in self.fragments:
                self._start(fragment, done)
            for fragment in self.fragments:
                self._apply(fragment, alpha=0.0)
            average(floating_buffers(self.model), self.comm)
            self.formula_bytes += average_bytes(floating_buffers(self.model), self.comm.size)
        return None

    def local_state(self) -> dict[str, Tensor]:
        """Wait for the fragments in flight, and return their means and when they are to be applied.

        Also returned are anchor and velocity of the outer optimizer before that.
        """
        import torch

        state = {"anchor": self.outer.anchor.clone(), "velocity": self.outer.velocity.clone()}
        for index, fragment in enumerate(self.fragments):
            if fragment.finish is not None:
                mean = fragment.finish().clone()
                fragment.finish = lambda mean=mean: mean
                state |= {f"mean.{index}": mean, f"arrives.{index}": torch.tensor(fragment.arrives)}
        return state

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        """Restore the fragments in flight, which are applied when they would have been."""
        self.outer.anchor.copy_(state["anchor"])
        self.outer.velocity.copy_(state["velocity"])
        for index, fragment in enumerate(self.fragments):
            if f"mean.{index}" in state:
                mean = state[f"mean.{index}"].to(self.outer.anchor.device)
                fragment.arrives, fragment.finish = int(state[f"arrives.{index}"]), lambda mean=mean: mean

    def average_replicas(self, step: int) -> None:
        """Apply the fragments in flight, then average all replicas (collective)."""
        self._apply_all()
        super().average_replicas(step)

    def _apply_all(self) -> None:
        for fragment in self.fragments:
            if fragment.finish is not None:
                self._apply(fragment, self.options.alpha)

    def _start(self, fragment: Fragment, done: int) -> None:
        from labkit.gradients.compression.narrow import mean_bytes, start_mean
        from labkit.gradients.updates.average import flatten, trainable_weights

        section = slice(fragment.begin, fragment.end)
        gradient = self.outer.anchor[section] - flatten(trainable_weights(self.model))[section]
        fragment.finish = start_mean(gradient, self.comm, self.options.bits)
        self.formula_bytes += mean_bytes(gradient.numel(), self.comm.size, self.options.bits, gradient.element_size())
        fragment.arrives = done + self.options.delay

    def _apply(self, fragment: Fragment, alpha: float) -> None:
        from labkit.gradients.updates.average import flatten, trainable_weights, unflatten_into

        assert fragment.finish is not None
        anchor = self.outer.step(fragment.finish(), fragment.begin)
        fragment.finish = None
        weights = trainable_weights(self.model)
        values = flatten(weights)
        own = values[fragment.begin : fragment.end]
        own.mul_(alpha).add_(anchor, alpha=1 - alpha)
        unflatten_into(weights, values)
