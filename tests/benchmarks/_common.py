"""What the benchmarks share: the machine, repeats in turn, medians, a table, JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment, Machine
from labkit.launch import launch
from labkit.runs import Run
from labkit.runs.environment import versions

# These scripts compare runs with loops on CPUs; `auto` would put the runs on a GPU where there is one (tests.gpu).
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def arguments(description: str, repeats: int = 5) -> argparse.Namespace:
    """--repeats and --json, and a run directory of the benchmark's own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"repeats of each, in turn (default: {repeats})")
    parser.add_argument("--json", action="store_true", help="print JSON in the last line")
    options = parser.parse_args()
    os.environ["LABKIT_HOME"] = tempfile.mkdtemp(prefix="labkit-benchmark-")
    return options


def interleave(cases: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run every case once, then every case again, …: machines drift. Returns the figures of each."""
    figures: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats):
        for name, case in cases.items():
            figures[name].append(case())
            print(f"  {repeat + 1}/{repeats} {name}: {figures[name][-1]:.4g}", file=sys.stderr, flush=True)
    return figures


def finished(experiment: Experiment) -> Run:
    """Launch, wait, and insist on a good end."""
    run = launch(experiment, baseline=None)
    run.result(timeout=1800)
    return run


def by_hand(steps: int, warmup: int, bucket: str = "default") -> float:
    """Median step of the hand-written DDP loop on two ranks (s); `bucket` as in _by_hand.py."""
    script = str(Path(__file__).with_name("_by_hand.py"))
    with tempfile.TemporaryDirectory() as folder:
        given = [str(Path(folder, "store")), str(steps), str(Path(folder, "result")), bucket]
        ranks = [
            subprocess.Popen(
                [sys.executable, script, "ddp", str(rank), *given],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        errors = [rank.communicate()[1] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise RuntimeError("the hand-written loop failed:\n" + "\n".join(errors))
        return statistics.median(json.loads(Path(folder, "result").read_text())[warmup:])


def ratios(figures: dict[str, list[float]], over: str, under: str) -> list[float]:
    """Ratio of two cases, repeat by repeat."""
    return [a / b for a, b in zip(figures[over], figures[under], strict=True)]


def median_and_range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(
    title: str, rows: list[tuple[str, str]], claims: list[tuple[str, float, str, float]], options: Any, data: Any
) -> int:
    """Print the table; a claim is (what, figure, "<=" or ">=", bound). Returns 0 if all of them hold, else 1."""
    machine = Machine.here()
    torch, today = versions().get("torch"), time.strftime("%Y-%m-%d")
    print(f"\n{title}\n{machine.cpu_model}, {machine.cores} cores, torch {torch}, {today}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:{width}}  {value}")
    verdicts = []
    for what, figure, sign, bound in claims:
        holds = figure <= bound if sign == "<=" else figure >= bound
        verdicts.append({"claim": f"{what} {sign} {bound:g}", "figure": figure, "holds": holds})
        print(f"  {'holds ' if holds else 'MISSED'}  {what}: {figure:.3f} {sign} {bound:g}")
    if options.json:
        described = {
            "title": title,
            "machine": machine.to_dict(),
            "versions": versions(),
            "claims": verdicts,
            "data": data,
        }
        print(json.dumps(described))
    return 0 if all(verdict["holds"] for verdict in verdicts) else 1
