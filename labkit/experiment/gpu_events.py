"""The events of the monitor of the GPUs: the name of each, what it means, and its fields with bounds and units.

The supervisor of a run writes them to `gpus.jsonl` (launch/gpu_monitor.py), because ranks must not wait for the driver.
A figure that the driver does not report is left out. Readers trust nothing (runs/gpus.py).
"""

from __future__ import annotations

from labkit.experiment.events import BYTES, SECONDS, Event, Field, Figures, Integer, Number, Text

MAX_GPUS = 128
"""Maximum number of GPUs of a run, including slices (MIG) that are used like GPUs."""
THROTTLING = ("power", "thermal", "power_brake", "hardware")
"""Reasons for which a GPU reduces its clocks: its power limit, its temperature, the external power brake of the
server, and a slowdown by the hardware without one of these reasons.
"""
SUPERVISOR = "the supervisor"

_GPU = Field("gpu", Integer(high=MAX_GPUS - 1), "Number of the GPU within the run, in the order that CUDA uses.")
_PERCENT, _WATTS, _MEGAHERTZ = Number(0, 100), Number(0, 1e5), Number(0, 1e6)
_GENERATION, _WIDTH = Integer(high=32), Integer(high=64)

_VOCABULARY = (
    Event(
        "gpu",
        SUPERVISOR,
        "A GPU of the run is being observed.",
        (
            _GPU,
            Field("index", Integer(high=1023), "Its number in nvidia-smi; left out for a slice of a GPU (MIG)."),
            Field("uuid", Text(100), "Its UUID."),
            Field("name", Text(100), "Its name."),
            Field("slice", Integer(high=1), "1 for a slice of a GPU (MIG): all but memory is that of the whole GPU."),
            Field("memory_bytes", BYTES, "Memory of the card (bytes)."),
            Field("power_limit_watts", _WATTS, "Power limit in force (W)."),
            Field("sm_clock_mhz", _MEGAHERTZ, "Maximum clock of the multiprocessors (MHz)."),
            Field("pcie_generation", _GENERATION, "Highest PCIe generation of this GPU in this system."),
            Field("pcie_width", _WIDTH, "Largest number of PCIe lanes of this GPU in this system."),
        ),
    ),
    Event(
        "gpu_use",
        SUPERVISOR,
        "What one GPU did for a second, or in a long run for several.",
        (
            _GPU,
            Field("seconds", SECONDS, "Time that the figures cover, up to when they were written (s)."),
            Field("utilisation", _PERCENT, "Mean share of the time in which a kernel was running (%)."),
            Field("utilisation_max", _PERCENT, "Largest such share within one second (%)."),
            Field("memory_bytes", BYTES, "Largest memory in use on the card, by any process (bytes)."),
            Field("power_watts", _WATTS, "Mean power (W)."),
            Field("energy_joules", Number(0, 1e12), "Energy (J), from the energy counter if the GPU has one."),
            Field("temperature_celsius", Number(-100, 300), "Highest temperature (°C)."),
            Field("sm_clock_mhz", _MEGAHERTZ, "Mean clock of the multiprocessors (MHz)."),
            Field(
                "throttled", Figures(len(THROTTLING)), f"Seconds of reduced clocks by reason: {', '.join(THROTTLING)}."
            ),
            Field("pcie_generation", _GENERATION, "Highest PCIe generation seen; GPUs lower it when they are idle."),
            Field("pcie_width", _WIDTH, "Largest number of PCIe lanes seen."),
            Field("other_processes", Integer(high=100_000), "Largest number of processes of others on the card."),
            Field("other_bytes", BYTES, "Largest memory of the processes of others (bytes)."),
        ),
    ),
    Event(
        "gpus_unknown",
        SUPERVISOR,
        "There are no figures, or no further ones, of one GPU or of all.",
        (
            Field("gpu", Integer(high=MAX_GPUS - 1), "Number of the GPU; left out if it is true for all."),
            Field("reason", Text(400), "Why, in one sentence."),
        ),
    ),
)
GPU_EVENTS = {event.name: event for event in _VOCABULARY}
"""All events of the monitor by name."""
