"""What the figures of a GPU say about why it is slow or nearly full, in sentences: pure functions, live and at the end.

Each rule takes how a GPU was used (`GpuUse`) and returns a sentence without a full stop, or an empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from labkit.runs.gpu_use import GpuUse

MIN_SECONDS = 10.0
"""Means over less training than this (s) are no reason for a warning."""
IDLE_PERCENT = 30.0
FULL_SHARE = 0.95
THROTTLED_SHARE = 0.05
"""Clocks that are reduced for less than this share of the training are not mentioned."""
MIN_OTHER_BYTES = 64 * 2**20
"""The desktop of a workstation needs about as much; less than this of others is not mentioned."""
REASONS = {
    "power": "it reached its power limit",
    "thermal": "it was too hot",
    "power_brake": "the server's power brake was on",
    "hardware": "the hardware slowed it down",
}

Rule = Callable[[GpuUse], str]


def gpu_warnings(uses: Sequence[GpuUse]) -> list[str]:
    """Return the warnings about all GPUs of a run; one that is true of several GPUs in the same words appears once."""
    titles: dict[str, list[str]] = {}
    for use in uses:
        for rule in RULES:
            if sentence := rule(use):
                titles.setdefault(sentence, []).append(use.title)
    return [f"{', '.join(names)}: {sentence}" for sentence, names in titles.items()]


def throttled(use: GpuUse) -> str:
    """Warn if clocks were reduced: the main reason, for how long, and to which clock."""
    if use.training_seconds < MIN_SECONDS or not use.throttled_seconds:
        return ""
    reason = max(use.throttled_seconds, key=use.throttled_seconds.__getitem__)
    seconds = use.throttled_seconds[reason]
    share = min(1.0, seconds / use.training_seconds)
    if share < THROTTLED_SHARE:
        return ""
    time = f"clocks were reduced for {seconds:.0f} s ({100 * share:.0f} % of the training)"
    return f"{time} because {REASONS[reason]}{_limit(use, reason)}{_slowdown(use)}"


def _limit(use: GpuUse, reason: str) -> str:
    """Return the figure that belongs to the reason, in words."""
    if reason == "power" and use.power_limit_watts:
        return f" of {use.power_limit_watts:.0f} W, as most GPUs do under full load"
    if reason == "thermal" and use.temperature_max_celsius is not None:
        return f", up to {use.temperature_max_celsius:.0f} °C"
    return ""


def _slowdown(use: GpuUse) -> str:
    """Return how far the clock fell, in words."""
    if not use.throttled_sm_clock_mhz or not use.sm_clock_max_mhz:
        return ""
    return f"; the SM clock was then {use.throttled_sm_clock_mhz:.0f} of {use.sm_clock_max_mhz:.0f} MHz on average"


def shared(use: GpuUse) -> str:
    """Warn if processes that are not of the run hold memory on the card."""
    if not use.other_processes or (use.other_bytes or 0) < MIN_OTHER_BYTES:
        return ""
    who = "another process" if use.other_processes == 1 else f"{use.other_processes} other processes"
    verb = "holds" if use.other_processes == 1 else "hold"
    return (
        f"{who} {verb} {_gibibytes(use.other_bytes or 0)} GiB on this card, so its speed is not that of the run alone"
    )


def narrow_link(use: GpuUse) -> str:
    """Warn if the PCIe link has fewer lanes, or a lower generation, under load than this GPU and system can have."""
    lacks = []
    if use.pcie_width and use.pcie_width_max and use.pcie_width < use.pcie_width_max:
        lacks.append(f"{use.pcie_width} of {use.pcie_width_max} lanes")
    if use.pcie_generation and use.pcie_generation_max and use.pcie_generation < use.pcie_generation_max:
        lacks.append(f"generation {use.pcie_generation} of {use.pcie_generation_max}")
    return (
        f"under load its PCIe link has {' and '.join(lacks)}: check the slot, the riser and the BIOS" if lacks else ""
    )


def full(use: GpuUse) -> str:
    """Warn if the memory of the card was nearly used up."""
    if not use.memory_bytes or not use.memory_peak_bytes or use.memory_peak_bytes <= FULL_SHARE * use.memory_bytes:
        return ""
    used, memory = _gibibytes(use.memory_peak_bytes), _gibibytes(use.memory_bytes)
    percent = 100 * use.memory_peak_bytes / use.memory_bytes
    return f"{used} of {memory} GiB were in use ({percent:.0f} %): a larger batch or an evaluation may not fit"


def idle(use: GpuUse) -> str:
    """Warn if no kernel was running for most of the training."""
    if use.training_seconds < MIN_SECONDS or use.utilisation_percent is None or use.utilisation_percent >= IDLE_PERCENT:
        return ""
    return (
        f"mostly idle: a kernel was running for {use.utilisation_percent:.0f} % of the training; "
        "a larger batch, faster data or a compiled model would use it better"
    )


def unobserved(use: GpuUse) -> str:
    """Say why there are no figures of a GPU, or no further ones."""
    return use.reason


RULES: tuple[Rule, ...] = (throttled, shared, narrow_link, full, idle, unobserved)


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.1f}"
