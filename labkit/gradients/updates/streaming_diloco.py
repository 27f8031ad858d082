"""Streaming DiLoCo: DiLoCo by fragments, one at a time, while the ranks train on (Douillard et al., 2025).

The weights fall into P fragments of about one size; each is exchanged every H updates, and their turns lie H/P apart,
so the most that travels at once is 1/P. An exchange has `delay` updates to arrive; then the rank blends what the outer
optimizer has made of the fragment with the weights that it has meanwhile:  w ← α·w + (1-α)·anchor.

One fragment, no delay and α = 0 is DiLoCo. What is local and what is averaged: as in diloco.py.
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
    """A stretch of the flat weights, and its exchange while there is one."""

    begin: int
    end: int
    offset: int
    """Its turn comes when (updates done - offset) is a multiple of H."""
    arrives: int = -1
    """Updates done when the exchange under way is to be used."""
    finish: Callable[[], Tensor] | None = None


class StreamingDiLoCo(DiLoCo):
    """DiLoCo by fragments, overlapped."""

    class Options(DiLoCo.Options):
        bits: Literal[32, 16, 8, 4] = 4
        """Bits in which each number of the outer gradient travels."""
        fragments: int = Field(default=2, ge=1, le=1000)
        """Into how many parts the weights fall (P)."""
        delay: int = Field(default=1, ge=0, le=1000)
        """Updates that an exchange has to arrive."""
        alpha: float = Field(default=0.5, ge=0, lt=1)
        """Part of its own weights that a rank keeps when a fragment arrives."""

    def __init__(self, context: UpdateContext) -> None:
        super().__init__(context)
        self.max_step_skew += self.options.delay  # a fragment that has left is waited for so much later

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from replicas_only(experiment)
        update: Any = experiment.gradients.update
        if update.fragments > update.every:
            reason = f"{update.fragments} fragments cannot take turns within {update.every} updates"
            yield Problem("gradients.update.fragments", reason, update.every)
        if update.delay >= update.every:
            reason = f"an exchange must arrive before the next one, after {update.every} updates, begins"
            yield Problem("gradients.update.delay", reason, update.every - 1)

    def load(self, state: dict[str, Tensor]) -> None:
        """Begin with the weights as they are, or go on from a checkpoint."""
        super().load(state)
        length, parts, every = self.outer.anchor.numel(), self.options.fragments, self.options.every
        borders = [length * part // parts for part in range(parts + 1)]
        self.fragments = [
            Fragment(begin, end, every * part // parts) for part, (begin, end) in enumerate(pairwise(borders))
        ]

    def after_update(self, step: int) -> int | None:
        """Take in what has arrived, send what has its turn; after the last update, bring all to its end."""
        from labkit.gradients.updates.average import average, average_bytes, floating_buffers

        done = step + 1
        for fragment in self.fragments:
            if fragment.finish is not None and done >= fragment.arrives:
                self._arrive(fragment, self.options.alpha)
        turns = [one for one in self.fragments if done > one.offset and (done - one.offset) % self.options.every == 0]
        for fragment in turns:
            self._leave(fragment, done)
            if not self.options.delay:
                self._arrive(fragment, self.options.alpha)
        if done == self.context.steps:
            self._settle()
            for fragment in self.fragments:
                self._leave(fragment, done)
            for fragment in self.fragments:
                self._arrive(fragment, alpha=0.0)
            average(floating_buffers(self.model), self.comm)
            self.formula_bytes += average_bytes(floating_buffers(self.model), self.comm.size)
        return None

    def local_state(self) -> dict[str, Tensor]:
        """The means of the fragments under way, which have arrived now, and when they are to be used.

        Also the agreed weights and their momentum as they are before that.
        """
        import torch

        kept = {"anchor": self.outer.anchor.clone(), "velocity": self.outer.velocity.clone()}
        for place, fragment in enumerate(self.fragments):
            if fragment.finish is not None:
                mean = fragment.finish().clone()
                fragment.finish = lambda mean=mean: mean
                kept |= {f"mean.{place}": mean, f"arrives.{place}": torch.tensor(fragment.arrives)}
        return kept

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        """Let them arrive when they would have."""
        self.outer.anchor.copy_(state["anchor"])
        self.outer.velocity.copy_(state["velocity"])
        for place, fragment in enumerate(self.fragments):
            if f"mean.{place}" in state:
                mean = state[f"mean.{place}"].to(self.outer.anchor.device)
                fragment.arrives, fragment.finish = int(state[f"arrives.{place}"]), lambda mean=mean: mean

    def average_replicas(self, step: int) -> None:
        """What is under way arrives; then all go on from the mean."""
        self._settle()
        super().average_replicas(step)

    def _settle(self) -> None:
        for fragment in self.fragments:
            if fragment.finish is not None:
                self._arrive(fragment, self.options.alpha)

    def _leave(self, fragment: Fragment, done: int) -> None:
        from labkit.gradients.compression.narrow import mean_bytes, start_mean
        from labkit.gradients.updates.average import flatten, trainable_weights

        here = slice(fragment.begin, fragment.end)
        moved = self.outer.anchor[here] - flatten(trainable_weights(self.model))[here]
        fragment.finish = start_mean(moved, self.comm, self.options.bits)
        self.formula_bytes += mean_bytes(moved.numel(), self.comm.size, self.options.bits, moved.element_size())
        fragment.arrives = done + self.options.delay

    def _arrive(self, fragment: Fragment, alpha: float) -> None:
        from labkit.gradients.updates.average import flatten, trainable_weights, unflatten_into

        assert fragment.finish is not None
        agreed = self.outer.step(fragment.finish(), fragment.begin)
        fragment.finish = None
        weights = trainable_weights(self.model)
        values = flatten(weights)
        own = values[fragment.begin : fragment.end]
        own.mul_(alpha).add_(agreed, alpha=1 - alpha)
        unflatten_into(weights, values)
