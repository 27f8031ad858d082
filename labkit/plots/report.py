"""One HTML file about one or several runs, which opens without a kernel and without a network.

Nothing from a run directory reaches the page unescaped, and the page's policy forbids every connection.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from labkit.experiment import safe_files
from labkit.experiment.run_directory import read_json
from labkit.plots import curves, gpus, ranks, speedup, static, theme
from labkit.plots.closeup import (
    cost_figures,
    detail_figures,
    gpu_figures,
    method_figures,
    precision_figures,
    sparsity_figures,
)
from labkit.plots.picture import Picture
from labkit.plots.shown import LabeledRun, labeled_runs
from labkit.plots.table import html_table, runs_rows
from labkit.runs.data import RunData
from labkit.runs.data_used import data_used
from labkit.runs.gpu_use import gpu_uses

LOG_LINES = 40
MAX_VALUE = 400

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 15px/1.55 {theme.FONT}; color: {theme.INK}; background: #fff; max-width: 1200px;
  margin: 0 auto; padding: 28px 24px 64px; }}
h1 {{ font-size: 26px; line-height: 1.25; margin: 0 0 4px; }}
h2 {{ font-size: 19px; margin: 36px 0 8px; border-bottom: 1px solid {theme.FAINT}; padding-bottom: 4px; }}
h3 {{ font-size: 16px; margin: 24px 0 6px; overflow-wrap: anywhere; }}
.lead {{ font-size: 18px; margin: 4px 0 0; }} .muted {{ color: {theme.MUTED}; }}
.failed {{ border-left: 5px solid {theme.PALETTE[1]}; padding: 4px 12px; background: #fdf3ec; }}
pre {{ background: #f5f7fa; border: 1px solid {theme.FAINT}; border-radius: 6px; padding: 10px 12px; overflow: auto;
  max-height: 340px; font-size: 12.5px; white-space: pre-wrap; overflow-wrap: anywhere; }}
summary {{ cursor: pointer; }} details {{ margin: 4px 0 14px; }} figure {{ margin: 0; }}
@media print {{ details > * {{ display: block; }} }}
"""


def report(runs: Iterable[Any] | Any, path: str | Path | None = None, comparison: Any = None) -> Path:
    """Write the report of one or several runs and return its path.

    `runs` are Runs, ids or paths; the default `path` is report.html in the directory of the last run. `comparison` is
    the result of `labkit.runs.compare.compare`; None compares the runs with each other. Raises OSError if the file
    cannot be written.
    """
    labeled = labeled_runs(runs)
    if not labeled:
        raise ValueError("a report needs at least one run")
    if comparison is None:
        comparison = _compared(labeled)
    target = Path(path) if path is not None else labeled[-1].data.directory.path / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    # A link at report.html in a run directory is replaced, not followed.
    safe_files.replace(target, page(labeled, comparison).encode("utf-8", "backslashreplace"), mode=0o644)
    return target


def _compared(labeled: Sequence[LabeledRun]) -> Any:
    from labkit.runs.compare import compare

    try:
        return compare([run.data.directory for run in labeled], skip_unreadable=True)
    except OSError:
        return None


def page(labeled: Sequence[LabeledRun], comparison: Any) -> str:
    """Return the whole page as text."""
    rows = list(getattr(comparison, "rows", None) or [])
    trained = [run for run in labeled if not run.is_ceiling] or list(labeled)
    figures = [curves.loss(trained), curves.metric(trained), curves.throughputs(labeled)]
    if rows:
        figures.insert(0, speedup.speedup(comparison))
    headline = speedup.finding(rows) if rows else curves.metric_finding(trained)
    title = f"{theme.plain(labeled[-1].label)}" if len(labeled) == 1 else f"{len(labeled)} runs compared"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{html.escape(headline)}.</p>',
        f'<p class="muted">{html.escape(_baseline(comparison))} Written {time.strftime("%Y-%m-%d %H:%M")}.</p>',
    ]
    if rows:
        body += [
            "<h2>Comparison</h2>",
            html_table(runs_rows(rows), "Speed-up over the baseline, with its 95 % interval"),
        ]
    body.append("<h2>Curves</h2>")
    scripts = [_library()]
    for number, figure in enumerate(figures):
        body.append(_figure(number, figure))
    for heading, group in (
        ("How ranks combined gradients or weights", method_figures(trained)),
        ("What accuracy costs", cost_figures(trained)),
        ("Which weights are zero", sparsity_figures(trained)),
        ("In which precision the layers compute", precision_figures(trained)),
        ("One step in detail", detail_figures(trained)),
        ("What the GPUs did", gpu_figures(trained)),
    ):
        if group:
            body.append(f"<h2>{heading}</h2>")
            body += [_figure(len(figures) + number, figure) for number, figure in enumerate(group)]
            figures += group
    scripts.append(_drawing(figures))
    for run in labeled:
        body += _run(run)
    # Only these scripts may run, by their hash, and nothing may be loaded or sent.
    allowed = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "form-action 'none'; base-uri 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>labkit: {html.escape(title)}</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(body)
        + "\n</main>"
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body></html>\n"
    )


def _baseline(comparison: Any) -> str:
    baseline = getattr(comparison, "baseline_run_id", None)
    return f"Baseline: {theme.plain(baseline)}." if baseline else "No baseline among these runs."


# -- figures --------------------------------------------------------------------------------------------------------


def _figure(number: int, figure: Picture) -> str:
    label = html.escape(figure.summary)
    style = f"height:{figure.layout.height or 360}px"
    return (
        f'<figure><div id="figure-{number}" role="img" aria-label="{label}" style="{style}">'
        f"</div><figcaption>{static.details(figure)}</figcaption></figure>"
    )


def _library() -> str:
    """Return plotly.js, for one script of the page."""
    from plotly.offline import get_plotlyjs

    library: str = get_plotlyjs()
    # The HTML parser ends a script at the first closing tag, even inside a string.
    return re.sub(r"</(script)", r"<\\/\1", library, flags=re.IGNORECASE)


def _drawing(figures: Sequence[Picture]) -> str:
    """Return the script that draws all figures; JSON inside a script must not contain `<`."""
    plots = [json.loads(figure.to_json()) | {"config": static.config()} for figure in figures]
    for figure in plots:
        figure["layout"].pop("template", None)
    text = json.dumps(plots).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return (
        f"const figures = {text};\n"
        "figures.forEach((one, index) => Plotly.newPlot(`figure-${index}`, one.data, one.layout, one.config));"
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# -- one run --------------------------------------------------------------------------------------------------------


def _run(run: LabeledRun) -> list[str]:
    data = run.data
    status = data.status
    parts = [
        f"<h2>{html.escape(run.label)}</h2>",
        f'<p class="muted">{html.escape(theme.plain(data.directory.id))}, {html.escape(theme.plain(data.state))}</p>',
    ]
    if used := html.escape(theme.plain(data_used(data.facts), 400)):
        parts.append(f'<p class="muted">Data: {used}.</p>')
    cause = status.get("cause")
    if isinstance(cause, dict):
        parts += _cause(cause)
    warnings = status.get("warnings")
    if isinstance(warnings, list) and warnings:
        items = "".join(f"<li>{html.escape(theme.plain(warning, 400))}</li>" for warning in warnings[:50])
        parts.append(f"<h3>Warnings</h3><ul>{items}</ul>")
    parts += ["<h3>Ranks</h3>", html_table(ranks.table_rows(ranks.rank_rows(data)))]
    parts += _gpus(data)
    settings = run.experiment.to_dict() if run.experiment else {}
    parts.append(_details("Settings", html_table(flat(settings), empty="The experiment cannot be read.")))
    environment = read_json(data.directory.environment)
    environment_rows = flat(environment if isinstance(environment, dict) else {})
    parts.append(_details("Environment", html_table(environment_rows, empty="Nothing was recorded.")))
    parts += _errors(data.errors)
    return parts


def _gpus(data: RunData) -> list[str]:
    """Return the table of the GPUs, and what is to be read with it; nothing for a run on the CPU."""
    rows = gpus.table_rows(gpu_uses(data))
    parts = ["<h3>GPUs</h3>", html_table(rows)] if rows else []
    return parts + [f"<p>{html.escape(sentence)}.</p>" for sentence in gpus.sentences(data)]


def _cause(cause: dict[str, Any]) -> list[str]:
    message = html.escape(theme.plain(cause.get("message") or "", 500))
    kind = html.escape(theme.plain(cause.get("kind") or "", 40))
    parts = [f'<p class="failed"><b>{kind}</b>: {message}</p>'] if message else []
    log = cause.get("log")
    if isinstance(log, list) and log:
        lines = "\n".join(html.escape(_line(line)) for line in log[-LOG_LINES:])
        parts.append(f"<h3>Last lines of the log</h3><pre>{lines}</pre>")
    return parts


def _errors(errors: Sequence[dict[str, Any]]) -> list[str]:
    return [
        _details(
            f"Exception of rank {error['rank']}: {error['type']}: {error['message'][:200]}",
            "<pre>" + "\n".join(html.escape(_line(line)) for line in error["traceback"].splitlines()[-80:]) + "</pre>",
        )
        for error in errors[:64]
    ]


def _line(text: Any) -> str:
    """Return a line of a log with its white space and without control characters."""
    return "".join(char for char in str(text)[:2000] if char == "\t" or char.isprintable())


def _details(title: str, body: str) -> str:
    return f"<details><summary><b>{html.escape(theme.plain(title, 300))}</b></summary>{body}</details>"


def flat(data: Any, prefix: str = "", max_rows: int = 400) -> list[dict[str, Any]]:
    """Return nested dicts as table rows of dotted names and values."""
    rows: list[dict[str, Any]] = []
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and len(rows) < max_rows and name.count(".") < 8:
            rows += flat(value, f"{name}.", max_rows)
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            rows.append({"Setting": theme.plain(name, 120), "Value": theme.plain(text, MAX_VALUE)})
    return rows[:max_rows]
