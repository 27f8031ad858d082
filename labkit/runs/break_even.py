"""At which rate of the link a method stops being worth its computing.

A step takes  compute + bytes / rate : what is computed, compressed and loaded, and what the ranks put on the link that
they share (`launch.network`: one link for all). Two methods are equally fast where

    rate  =  (bytes saved) / (extra seconds of computing)

Below it the smaller one is faster, above it the simpler one. Transfers that hide behind the backward pass make real
steps shorter than that: the formula is exact without overlap and an upper bound with it, for both.
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
"""Bytes a second in 1 Mbit/s."""
FASTEST_MBIT = 1e6
"""A break-even above the rate of any link is none."""


@dataclass(frozen=True)
class Cost:
    """What an update of one method costs."""

    bytes: float
    """That go over the link, of all ranks that share it."""
    steady: SteadyState
    """Seconds of single updates without those in which nothing was computed because something travelled."""

    def seconds(self, rate_mbit: float) -> float:
        """Step time at a rate of the link (Mbit/s)."""
        assert self.steady.median is not None
        return self.steady.median + self.bytes / (rate_mbit * MBIT)


def cost(runs: Iterable[tuple[Experiment, RunData]]) -> Cost | None:
    """From the runs of one method, over whatever links they went; None where bytes or exposed time were not measured.

    Ranks that draw their work do not stand still for each other: the formula is not theirs.
    """
    computing, sent = [], []
    for experiment, data in runs:
        found, over = split.columns(data, experiment), link_bytes(data, experiment)
        if data.draws or found is None or found.exposed is None or over is None:
            continue
        seconds = found.data + found.compute + found.compression + found.optimizer
        computing.append(rolling(np.nan_to_num(seconds), period(experiment)))
        sent.append(over)
    return Cost(float(np.median(sent)), SteadyState(np.concatenate(computing), 0)) if sent else None


def link_bytes(data: RunData, experiment: Experiment) -> float | None:
    """Bytes of one update that share a link: those of all ranks, or of the busiest of several emulated hosts."""
    hosts = getattr(experiment.launch.network, "hosts", 1)
    links = getattr(data, "links", {})
    if hosts > 1 and links:
        return max(float(link["bytes"]) / max(1.0, link["updates"]) for link in links.values())
    sent = data.sent[warmup(data.steps) :]
    return None if np.isnan(sent).all() else float(np.median(rolling(np.nan_to_num(sent), period(experiment))))


@dataclass(frozen=True)
class BreakEven:
    """Below `mbit` (Mbit/s) the method is faster than plain averaging, above it slower; 95 % interval from low to high.

    Infinite: it is faster at every rate, because it does not compute measurably longer. 0: at none, because it saves
    nothing.
    """

    mbit: float
    low: float
    high: float


def break_even(plain: Cost, method: Cost) -> BreakEven:
    """Where `method` stops being faster per step than `plain`, from costs that were measured on the same ranks."""
    assert plain.steady.median is not None
    assert method.steady.median is not None
    saved = plain.bytes - method.bytes
    extra = method.steady.median - plain.steady.median
    spread = method.steady.medians(seed=1) - plain.steady.medians(seed=2)
    tail = (1 - CONFIDENCE) / 2
    most, least = np.quantile(spread, 1 - tail), np.quantile(spread, tail)
    low, high = _rate(saved, float(most)), _rate(saved, float(least))
    return BreakEven(math.inf if high == math.inf else _rate(saved, extra), low, high)


def _rate(saved: float, extra: float) -> float:
    """Mbit/s at which `saved` bytes take `extra` seconds."""
    if saved <= 0:
        return 0.0
    rate = saved / extra / MBIT if extra > 0 else math.inf
    return rate if rate <= FASTEST_MBIT else math.inf
