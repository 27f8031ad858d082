"""Following the parity matrix in a terminal: a progress bar with time left, what is wrong as soon as it is known."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from labkit.launch.client import warm
from labkit.proofs.matrix import GOOD, Case, Result, counts, run
from labkit.proofs.matrix_log import MatrixLog

EVERY_S = 30.0
"""How often a log gets a line, where nobody watches."""


def follow(found: Sequence[Case], results: list[Result], quiet: bool = False, log: MatrixLog | None = None) -> None:
    """Run the cases and append to `results`, which so holds what is known also after an interrupt.

    With a `log`, what it knows is not run again, and what is run is added to it.
    """
    known = log.known(found) if log is not None else {}
    results += known.values()
    left_over = [case for case in found if str(case) not in known]
    console = Console(stderr=True, quiet=quiet, highlight=False, markup=False)
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    ]
    live = Progress(*columns, console=console, disable=quiet or not sys.stderr.isatty(), speed_estimate_period=300)
    warm()
    begun = said = time.monotonic()
    with live:
        task = live.add_task("parity matrix", total=len(found), completed=len(known))
        for result in run(left_over):
            results.append(result)
            if log is not None:
                log.add(result)
            text = ", ".join(f"{number} {outcome}" for outcome, number in counts(results).items() if number)
            live.update(task, completed=len(results), description=text)
            if result.outcome not in GOOD:
                console.print(f"{result.outcome}: {result.case}: {result.reason}")
            now = time.monotonic()
            if live.disable and now - said > EVERY_S:
                left = (now - begun) / (len(results) - len(known)) * (len(found) - len(results))
                console.print(f"labkit: {len(results)} of {len(found)} cases: {text}; about {left / 60:.0f} min left")
                said = now
