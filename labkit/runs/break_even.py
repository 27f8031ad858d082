"""The link rate at which a method stops being worth its extra computing.

A step takes  compute + bytes / rate : the time to compute, compress and load, plus what the ranks send over the link
that they share (`launch.network`: one link for all). Two methods are equally fast at

    rate  =  (bytes saved) / (extra seconds of computing)

Below this rate the method that sends less is faster, above it the one that computes less. Transfers that overlap with
the backward pass make real steps shorter: for both methods the formula is exact without overlap and an upper bound with
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from labkit.experiment import Experiment
from labkit.runs import split
from labkit.runs.data import RunData
from labkit.runs.methods import period
from labkit.runs.steady import CONFIDENCE, SteadyState, rolling, warmup

MBIT = 1e6 / 8
"""Bytes per second in 1 Mbit/s."""
FASTEST_MBIT = 1e6
"""A break-even rate above this one (Mbit/s), faster than any link, counts as infinite."""


@dataclass(frozen=True)
class Cost:
    """What an optimizer step of one method costs."""

    bytes: float
    """Bytes per step over the link, of all ranks that share it."""
    steady: SteadyState
    """Seconds of single steps, without those in which nothing was computed because of communication."""

    def seconds(self, rate_mbit: float) -> float:
        """Return the step time (s) at a link rate in Mbit/s."""
        assert self.steady.median is not None
        return self.steady.median + self.bytes / (rate_mbit * MBIT)


def cost(runs: Iterable[tuple[Experiment, RunData]]) -> Cost | None:
    """Return the cost of one method from its runs over any links; None if bytes or exposed time were not measured.

    Runs whose ranks take work from a queue are left out: such ranks do not wait for each other, so the formula does not
    hold for them.
    """
    computing, byte_counts = [], []
    for experiment, data in runs:
        parts, shared_bytes = split.columns(data, experiment), link_bytes(data, experiment)
        if data.uses_work_queue or parts is None or parts.exposed is None or shared_bytes is None:
            continue
        seconds = parts.data + parts.compute + parts.compression + parts.optimizer
        computing.append(rolling(np.nan_to_num(seconds), period(experiment)))
        byte_counts.append(shared_bytes)
    return Cost(float(np.median(byte_counts)), SteadyState(np.concatenate(computing), 0)) if byte_counts else None


def link_bytes(data: RunData, experiment: Experiment) -> float | None:
    """Return the bytes per step that share a link: of all ranks, or of the busiest of several emulated hosts."""
    hosts = getattr(experiment.launch.network, "hosts", 1)
    links = getattr(data, "links", {})
    if hosts > 1 and links:
        return max(float(link["bytes"]) / max(1.0, link["updates"]) for link in links.values())
    bytes_per_step = data.sent[warmup(data.steps) :]
    return (
        None
        if np.isnan(bytes_per_step).all()
        else float(np.median(rolling(np.nan_to_num(bytes_per_step), period(experiment))))
    )


@dataclass(frozen=True)
class BreakEven:
    """The rate in Mbit/s below which a method is faster than plain averaging, with a 95 % interval from low to high.

    Infinite if it is faster at every rate, because it does not compute measurably longer; 0 if it is faster at none,
    because it saves nothing.
    """

    mbit: float
    low: float
    high: float


def break_even(plain: Cost, method: Cost) -> BreakEven:
    """Return the rate at which `method` stops being faster per step than `plain`, both measured on the same ranks."""
    assert plain.steady.median is not None
    assert method.steady.median is not None
    saved = plain.bytes - method.bytes
    extra = method.steady.median - plain.steady.median
    differences = method.steady.medians(seed=1) - plain.steady.medians(seed=2)
    tail = (1 - CONFIDENCE) / 2
    high_extra, low_extra = np.quantile(differences, 1 - tail), np.quantile(differences, tail)
    low_rate, high_rate = _rate(saved, float(high_extra)), _rate(saved, float(low_extra))
    return BreakEven(math.inf if high_rate == math.inf else _rate(saved, extra), low_rate, high_rate)


def _rate(saved: float, extra: float) -> float:
    """Return the rate in Mbit/s at which `saved` bytes take `extra` seconds."""
    if saved <= 0:
        return 0.0
    rate = saved / extra / MBIT if extra > 0 else math.inf
    return rate if rate <= FASTEST_MBIT else math.inf
