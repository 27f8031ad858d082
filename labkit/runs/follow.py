"""Follow a run in a terminal: a progress bar with the time left; a first Ctrl-C stops the run, a second ends it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from labkit.experiment.run_directory import TERMINAL
from labkit.experiment.safe_files import printable
from labkit.runs.checked import NOT_FINITE, formatted
from labkit.runs.data import RunData
from labkit.runs.data_used import data_used
from labkit.runs.interrupts import on_end_signals
from labkit.runs.model_flops import CONVENTION, rate_text
from labkit.runs.run import Run

REFRESH_S = 0.2


def follow(run: Run, quiet: bool = False) -> Run:
    """Show the progress of `run` on standard error until it has ended."""
    console = Console(stderr=True, quiet=quiet)
    data, name = RunData(run.directory), printable(run.id)
    requests = 0
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    ]
    # Without a terminal, a progress bar only fills the log.
    live = Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty())
    if live.disable and not quiet:
        console.print(f"labkit: run {name}", highlight=False, markup=False)

    def interrupted(number: int, frame: Any) -> None:
        # A handler instead of KeyboardInterrupt: an exception may be raised where it is swallowed.
        nonlocal requests
        requests += 1

    handled = 0
    with on_end_signals(interrupted), live:
        task = live.add_task(f"{name} starting", total=None, figures="")
        while True:
            data.refresh(0.05)
            state = run.state
            live.update(
                task,
                description=f"{name} {state}",
                total=data.total_steps,
                completed=data.first + data.steps,
                figures=figures(data),
            )
            if state in TERMINAL:
                return run
            if requests > handled:
                answer = (
                    "ending it" if requests > 1 else "stopping after this step; press Ctrl-C again to end it at once"
                )
                run.request_stop(0.0 if requests > 1 else None)
                handled = requests
                with contextlib.suppress(OSError):  # the terminal may be closed
                    console.print(answer)
            time.sleep(REFRESH_S)


def figures(data: RunData) -> str:
    """Return the latest loss and metric as text."""
    parts = []
    if data.steps:
        parts.append(f"loss {formatted(data.loss[-1], '.4g')}")
    key = data.metric.get("key") if data.metric else None
    if data.evaluations and key in data.evaluations[-1][2]:
        parts.append(f"{key} {formatted(data.evaluations[-1][2][key], '.4g')}")
    return "  ".join(parts)


def gpu_in_words(use: dict[str, Any]) -> str | None:
    """Return how a GPU was used, from its entry in a summary: `93 % busy, 61.2 of 80.0 GiB, 402 W, 1.3 Wh, 71 °C`."""
    gibibytes = {name: use[name] / 2**30 for name in ("memory_peak_bytes", "memory_bytes") if use.get(name)}
    figures = (
        (use.get("utilisation_percent"), "{:.0f} % busy"),
        (gibibytes.get("memory_peak_bytes"), f"{{:.1f}} of {gibibytes.get('memory_bytes', math.nan):.1f} GiB"),
        (use.get("power_watts"), "{:.0f} W"),
        (None if use.get("energy_joules") is None else use["energy_joules"] / 3600, "{:.3g} Wh"),
        (use.get("temperature_max_celsius"), "up to {:.0f} °C"),
    )
    return ", ".join(form.format(value) for value, form in figures if value is not None) or None


def summary_text(summary: dict[str, Any]) -> str:
    """Return the summary as text, one figure with its unit per line; unknown figures are left out."""
    try:
        return _summary_text(summary)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return "  The summary of this run cannot be read."  # a directory from elsewhere may contain anything


def _add_model_flops(summary: dict[str, Any], add_line: Callable[[str, Any], None]) -> None:
    """Add the lines about model FLOPs, the rate with its convention and the MFU with its peak."""
    rate, mfu, peak = (summary.get(key) for key in ("model_flops_per_second", "mfu", "peak_flops_per_second"))
    if rate:
        add_line("model FLOP/s", f"{rate_text(rate)} ({CONVENTION})")
    if mfu and peak:
        add_line("MFU", f"{mfu:.1%} of {rate_text(peak)} ({summary.get('peak_of')}, dense)")


def _summary_text(summary: dict[str, Any]) -> str:
    lines = []

    def add_line(label: str, value: Any, form: str = "{}") -> None:
        if value is not None and not (isinstance(value, float) and not math.isfinite(value)):
            lines.append(f"  {printable(label):22} {printable(form.format(value))}")

    add_line("run", summary.get("run_id"))
    add_line("layout", f"{summary.get('layout')} ({summary.get('world_size')} ranks on {summary.get('device')})")
    add_line("data", data_used(summary.get("facts")) or None)
    add_line("steps", summary.get("steps"))
    for key, value in (summary.get("metrics") or {}).items():
        add_line(key.replace("_", " "), value, "{}" if value == NOT_FINITE else "{:.4g}")
    add_line("throughput", summary.get("samples_per_second"), "{:.1f} samples/s")
    _add_model_flops(summary, add_line)
    step = summary.get("step_seconds") or {}
    if step.get("median"):
        left_out = f"{step['warmup_steps']} warm-up steps left out"
        p10, p90 = 1e3 * step["p10"], 1e3 * step["p90"]
        add_line("step", f"{1e3 * step['median']:.1f} ms (p10 {p10:.1f}, p90 {p90:.1f}; {left_out})")
    add_line("first step after", summary.get("time_to_first_step_seconds"), "{:.2f} s")
    network = summary.get("network") or {}
    if network.get("bytes_per_step"):
        add_line("slow link", f"{network['bytes_per_step'] / 1e6:.3g} MB per step at {network['rate_mbit']:g} Mbit/s")
    for name, key in (("host memory at start", "start_memory_bytes"), ("peak memory per rank", "peak_memory_bytes")):
        peaks = [peak for peak in summary.get(key) or [] if peak]
        add_line(name, max(peaks) / 2**20 if peaks else None, "{:.0f} MiB")
    for use in summary.get("gpus") or []:
        add_line(use["title"], gpu_in_words(use))
    if summary.get("speedup"):
        low, high = summary["speedup_interval"]
        add_line("speed-up", f"{summary['speedup']:.2f} ({low:.2f} to {high:.2f}) over {summary['baseline_run_id']}")
        add_line("efficiency", summary.get("efficiency"), "{:.0%}")
    elif summary.get("world_size", 1) > 1:
        add_line("speed-up", "no baseline yet: run the same on one rank, or use --baseline measure")
    for note in summary.get("notes") or []:
        add_line("note", note)
    return "\n".join(lines)
