"""The target loss of a run, and the steps, samples, time and bytes that it took to reach it.

Methods that change the mathematics cannot be judged by throughput, but by the time to a target loss. The loss of single
steps is noisy, so the running mean is used throughout, and a target counts as reached at the step from which the mean
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

DEFAULT_MARGIN = 1.02
"""The default target is this many times the final loss of plain synchronous training."""


def window(steps: int) -> int:
    """Return the width of the running mean for a run of `steps` steps: a twentieth, at least 5."""
    return max(5, steps // 20)


def running_loss(data: RunData, over: int | None = None) -> Floats:
    """Return the running mean of the training loss over the last `over` steps (default: `window`), (steps,)."""
    loss = data.loss
    mean = smooth(loss, over or window(len(loss)))
    # A loss that is not finite is not a gap: no later step can have reached a target.
    return np.where(np.logical_or.accumulate(~np.isfinite(loss)), np.inf, mean) if len(loss) else mean


def final_loss(data: RunData, over: int | None = None) -> float | None:
    """Return the running mean at the last step; None without steps or if it is not finite."""
    mean = running_loss(data, over)
    return float(mean[-1]) if len(mean) and np.isfinite(mean[-1]) else None


@dataclass(frozen=True)
class Reached:
    """What it took to reach a target loss."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Samples seen in this run by then."""
    seconds: float
    """Seconds of training, without evaluations and checkpoints."""
    bytes: float | None
    """Bytes sent by all ranks together by then; None if they were not counted."""


def reached(data: RunData, target: float, over: int | None = None) -> Reached | None:
    """Return when the running mean of the loss falls to `target` or below and stays there; None if it never does.

    The mean is over `over` steps (default: `window` of this run), so step `over` is the first that can count.
    """
    over = over or window(data.steps)
    mean = running_loss(data, over)
    if not len(mean) or not mean[-1] <= target:
        return None
    above = np.flatnonzero(~(mean <= target))
    index = max(int(above[-1]) + 1 if len(above) else 0, min(over, len(mean)) - 1)
    sent_bytes = data.sent[: index + 1]
    return Reached(
        step=int(data.step[index]),
        samples=int(data.samples[: index + 1].sum()),
        seconds=float(data.training_seconds[index]),
        bytes=None if np.isnan(sent_bytes).all() else float(np.nansum(sent_bytes)),
    )


def reference(runs: Sequence[tuple[Experiment | None, RunData]]) -> int | None:
    """Return the index of the reference: the first plain synchronous run, with several ranks if possible."""
    plain = [index for index, (experiment, data) in enumerate(runs) if is_plain(experiment) and data.steps]
    return next((index for index in plain if runs[index][1].world_size > 1), plain[0] if plain else None)


def default_target(data: RunData, over: int | None = None) -> float | None:
    """Return the default target: `DEFAULT_MARGIN` times the final loss of the reference run `data`."""
    final = final_loss(data, over)
    return None if final is None else DEFAULT_MARGIN * final
