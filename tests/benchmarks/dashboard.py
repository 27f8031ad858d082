"""What a redraw of the live picture costs the kernel: 64 ranks × 100,000 steps of recorded events.

    python tests/benchmarks/dashboard.py [--ranks 64] [--steps 100000] [--redraws 60] [--json]

Files are read in short slices between redraws. A redraw is `Dashboard.redraw()`: comparing, reducing every line to at
most 2,000 points, one batch update of the FigureWidget, once a second the tables. Every redraw here has new steps to
show. Targets: 20 ms a redraw (median), 300 MB for the process at its peak. The events
are written by another process, so that their making does not count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

TARGET_MS, TARGET_MB = 20.0, 300.0
BATCH = 250


def write_events(path: Path, ranks: int, first: int, last: int) -> None:
    """Append the steps from `first` to `last` to the file of every rank."""
    from labkit.experiment.run_directory import RunDirectory

    directory = RunDirectory(path)
    random = np.random.default_rng(0)
    for rank in range(ranks):
        with open(directory.events(rank), "a", encoding="utf-8") as file:
            for begin in range(first, last, BATCH):
                at = np.arange(begin, min(begin + BATCH, last))
                seconds = 0.05 * (1 + 0.1 * np.abs(random.standard_normal(len(at))))
                columns = {
                    "loss": 2.3 * np.exp(-at / 3e4) + 0.05 * random.standard_normal(len(at)),
                    "seconds": seconds,
                    **dict.fromkeys(("data", "forward", "backward", "optimizer"), seconds / 4),
                }
                event: dict[str, Any] = {"event": "steps", "rank": rank, "first": begin, "samples": [8] * len(at)}
                event |= {"time": 0.0, "monotonic": 0.05 * float(at[-1])}
                event |= {name: values.round(6).tolist() for name, values in columns.items()}
                file.write(json.dumps(event) + "\n")


def elsewhere(function: Any, *arguments: Any) -> None:
    """Call in a process of its own, so that its memory is not counted here."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def make_run(path: Path, ranks: int, steps: int) -> None:
    """A run that is going on, with all but its last steps on disk."""
    from labkit.experiment.recipes import vision_ddp
    from labkit.experiment.run_directory import RunDirectory, write_json

    path.mkdir(parents=True)
    directory = RunDirectory(path)
    experiment = vision_ddp().replace(f"layout.dp_replicate={ranks}", f"training.steps={steps}")
    write_json(directory.experiment, experiment.replace("training.global_batch=512").to_dict())
    write_json(
        directory.status,
        {"run_id": path.name, "title": "benchmark", "state": "running", "world_size": ranks, "steps": steps},
    )
    entries = [{"rank": rank, "phase": "backward", "silent_s": 0.1, "memory_bytes": 2**28} for rank in range(ranks)]
    write_json(directory.progress, {"ranks": entries})


def measure(path: Path, ranks: int, steps: int, redraws: int) -> dict[str, Any]:
    """Catch up with what is there, then redraw while the file grows."""
    from labkit.experiment.run_directory import RunDirectory
    from labkit.runs.data import RunData
    from labkit.runs.run import Run
    from labkit.ui.dashboard import Dashboard

    dashboard = Dashboard()
    run = Run(RunDirectory(path))
    dashboard.runs.append(run)  # watch() would start the thread; here every redraw is called and timed
    dashboard._data[run.id] = RunData(run.directory)
    slices: list[float] = []
    live: list[float] = []

    def timed(times: list[float], function: Any) -> Any:
        begun = time.perf_counter()
        answer = function()
        times.append(1000 * (time.perf_counter() - begun))
        return answer

    begun = time.perf_counter()
    while not timed(slices, dashboard._read):
        pass
    caught_up_s = time.perf_counter() - begun
    for number in range(redraws):
        first = steps - 8 * (redraws - number)
        write_events(path, ranks, first, first + 8)
        while not timed(slices, dashboard._read):
            pass
        dashboard.figure._trace_edit_in_process = False  # as if a browser had drawn and answered
        timed(live, dashboard.redraw)
        time.sleep(0.1)
    while not dashboard.redraw(force=True):
        pass
    data = dashboard._data[run.id]
    assert data.steps == steps, (data.steps, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return {
        "ranks": ranks,
        "steps": steps,
        "points": max(len(trace.x) for trace in dashboard.figure.data),
        "redraw_ms": {"median": statistics.median(live), "p95": float(np.quantile(live, 0.95)), "samples": len(live)},
        "slice_ms": {
            "median": statistics.median(slices),
            "p95": float(np.quantile(slices, 0.95)),
            "samples": len(slices),
        },
        "caught_up_s": caught_up_s,
        "peak_mb": peak,
        "target_ms": TARGET_MS,
        "target_mb": TARGET_MB,
        "met": statistics.median(live) <= TARGET_MS and peak < TARGET_MB,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--redraws", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "runs" / "benchmark"
        make_run(path, given.ranks, given.steps)
        elsewhere(write_events, path, given.ranks, 0, given.steps - 8 * given.redraws)
        result = measure(path, given.ranks, given.steps, given.redraws)
    if given.json:
        print(json.dumps(result))
    else:
        rows = [
            ("redraw while the run goes on", result["redraw_ms"]),
            ("slice of reading", result["slice_ms"]),
        ]
        print(f"{given.ranks} ranks, {given.steps:,} steps, at most {result['points']:,} points a line\n")
        print(f"{'':32}{'median':>10}{'p95':>10}{'samples':>10}")
        for name, times in rows:
            print(f"{name:32}{times['median']:>7.1f} ms{times['p95']:>7.1f} ms{times['samples']:>10}")
        print(f"{'caught up after':32}{result['caught_up_s']:>8.1f} s")
        print(f"{'memory of the process, peak':32}{result['peak_mb']:>7.0f} MB")
        print(f"\ntarget: {TARGET_MS:g} ms median, {TARGET_MB:g} MB: {'met' if result['met'] else 'MISSED'}")
    return 0 if result["met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
