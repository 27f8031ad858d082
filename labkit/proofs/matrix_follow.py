"""Runs the parity matrix in a terminal: a progress bar with the time left, and failures as soon as they occur."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from labkit.launch.client import warm
from labkit.proofs.matrix import GOOD, Case, Result, counts, run
from labkit.proofs.matrix_log import MatrixLog

REPORT_INTERVAL_S = 30.0
"""Interval (s) of the lines in a log, if the output is not a terminal."""


def follow(cases: Sequence[Case], results: list[Result], quiet: bool = False, log: MatrixLog | None = None) -> None:
    """Run the cases and append to `results`, which therefore has the results so far even after an interrupt.

    Results that the `log` already has are reused, and new ones are added to it.
    """
    reused = log.reusable_results(cases) if log is not None else {}
    results += reused.values()
    remaining = [case for case in cases if str(case) not in reused]
    console = Console(stderr=True, quiet=quiet, highlight=False, markup=False)
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    ]
    live = Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty(), speed_estimate_period=300)
    warm()
    begun = last_report = time.monotonic()
    with live:
        task = live.add_task("parity matrix", total=len(cases), completed=len(reused))
        for result in run(remaining):
            results.append(result)
            if log is not None:
                log.add(result)
            text = ", ".join(f"{number} {outcome}" for outcome, number in counts(results).items() if number)
            live.update(task, completed=len(results), description=text)
            if result.outcome not in GOOD:
                console.print(f"{result.outcome}: {result.case}: {result.reason}")
            now = time.monotonic()
            if live.disable and now - last_report > REPORT_INTERVAL_S:
                left = (now - begun) / (len(results) - len(reused)) * (len(cases) - len(results))
                console.print(f"labkit: {len(results)} of {len(cases)} cases: {text}; about {left / 60:.0f} min left")
                last_report = now
