"""The state of a run in one sentence: how far it is, how long it will take, or why it failed."""

from __future__ import annotations

import html
from typing import Any

from labkit.plots import theme
from labkit.runs.data import RunData


def describe(status: dict[str, Any], data: RunData) -> tuple[str, float]:
    """Return the state in words (`Running, step 40 of 200, 12 s left.`) and the fraction of the steps that is done."""
    done, total = data.first + data.steps, data.total_steps
    share = min(1.0, done / total) if total else 0.0
    state = str(status.get("state", "starting"))
    position = f"step {done:,} of {total:,}" if total else f"step {done:,}"
    if state == "running" and done == data.first:
        return "Starting, no step yet.", share
    if state == "running":
        left = _time_left(data, total)
        return f"Running, {position}{f', {left} left' if left else ''}.", share
    if state in ("starting", "stopping"):
        return f"{state.capitalize()}, {position}.", share
    cause = status.get("cause")
    reason = theme.plain(cause.get("message"), 300) if isinstance(cause, dict) and cause.get("message") else ""
    return f"{state.capitalize()} after {position}{f': {reason}' if reason and state == 'failed' else ''}.", share


def _time_left(data: RunData, total: int | None) -> str:
    """Return the time left at the pace of the last steps, including evaluations; empty if it is unknown."""
    elapsed = data.elapsed
    if total is None or len(elapsed) < 3:
        return ""
    recent = elapsed[-min(len(elapsed), 200) :]
    seconds = (total - data.first - len(elapsed)) * float(recent[-1] - recent[0]) / (len(recent) - 1)
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(0.0, seconds):.0f} s"


def status_html(sentence: str) -> str:
    """Return a sentence as HTML that screen readers announce when it changes."""
    return f'<div role="status" aria-live="polite" class="labkit-state">{html.escape(sentence)}</div>'
