"""When a run has learned enough: the loss that it has to reach, and what it took to get there.

Throughput says nothing about methods that change the mathematics; time to a target loss does. The loss of single steps
is noise, so a running mean is meant throughout, and a target counts as reached from the step on from which the mean
*stays* at or below it: a dip is not enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labkit.experiment import Experiment
from labkit.runs.data import RunData
from labkit.runs.methods import is_plain
from labkit.runs.smooth import Floats, smooth

ROOM = 1.02
"""Without a target of one's own: so many times the loss at which plain synchronous training ends."""


def window(steps: int) -> int:
    """Over how many of so many steps the running mean goes: a twentieth, at least 5."""
    return max(5, steps // 20)


def running_loss(data: RunData, over: int | None = None) -> Floats:
    """Running mean of the training loss over the last `over` steps (default: `window`) at each step, (steps,)."""
    loss = data.loss
    mean = smooth(loss, over or window(len(loss)))
    # A loss that is no finite number is no gap in which nothing happened: what follows has not reached anything.
    return np.where(np.logical_or.accumulate(~np.isfinite(loss)), np.inf, mean) if len(loss) else mean


def final_loss(data: RunData, over: int | None = None) -> float | None:
    """The running mean at the last step; None before there is one, or where it is not finite."""
    mean = running_loss(data, over)
    return float(mean[-1]) if len(mean) and np.isfinite(mean[-1]) else None


@dataclass(frozen=True)
class Reached:
    """What it took to reach a loss."""

    step: int
    """Updates done."""
    samples: int
    """Seen in this run by then."""
    seconds: float
    """Of training: evaluations and checkpoints left out."""
    bytes: float | None
    """That all ranks together have sent by then; None where nobody counted."""


def reached(data: RunData, target: float, over: int | None = None) -> Reached | None:
    """The first step from which on the running mean of the loss stays at or below `target`; None if it never does.

    `over` steps are averaged (default: `window` of this run); the first step that can count is the first with so many.
    """
    over = over or window(data.steps)
    mean = running_loss(data, over)
    if not len(mean) or not mean[-1] <= target:
        return None
    above = np.flatnonzero(~(mean <= target))
    at = max(int(above[-1]) + 1 if len(above) else 0, min(over, len(mean)) - 1)
    sent = data.sent[: at + 1]
    return Reached(
        step=int(data.step[at]),
        samples=int(data.samples[: at + 1].sum()),
        seconds=float(data.training_seconds[at]),
        bytes=None if np.isnan(sent).all() else float(np.nansum(sent)),
    )


def reference(runs: Sequence[tuple[Experiment | None, RunData]]) -> int | None:
    """Which of `runs` the others are compared with: the first plain synchronous one, several ranks preferred."""
    plain = [at for at, (experiment, data) in enumerate(runs) if is_plain(experiment) and data.steps]
    return next((at for at in plain if runs[at][1].world_size > 1), plain[0] if plain else None)


def default_target(data: RunData, over: int | None = None) -> float | None:
    """`ROOM` times what this run, the reference, ends at."""
    final = final_loss(data, over)
    return None if final is None else ROOM * final
