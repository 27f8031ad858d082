"""From the click to the end of the first training step: labkit beside `accelerate launch` and `notebook_launcher`.

All train the vision recipe on two ranks. Warm labkit has its standby waiting, as in a notebook whose Lab is shown; cold
labkit starts with nothing. `notebook_launcher` runs in a process that has torch imported, as a kernel would.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import arguments, finished, interleave, median_and_range, report

from labkit.experiment.recipes import vision_ddp
from labkit.launch import client

SCRIPT = str(Path(__file__).with_name("_by_hand.py"))
NOTEBOOK = """
import sys, time
sys.path.insert(0, sys.argv[1])
from accelerate import notebook_launcher
import torch, labkit.workloads.vision
from _by_hand import first_step_with_accelerate
begun = time.monotonic()
notebook_launcher(first_step_with_accelerate, (sys.argv[2],), num_processes=2, use_port=sys.argv[3])
print(float(open(sys.argv[2]).read()) - begun)
"""
EXPERIMENT = vision_ddp().replace("training.steps=3", "training.evaluate_every=0", "training.checkpoint_every=0")


def labkit_warm() -> float:
    assert client.warm(wait=120), "the standby does not start"
    return float(finished(EXPERIMENT).summary()["time_to_first_step_seconds"])


def labkit_cold() -> float:
    os.environ["LABKIT_STANDBY"] = "0"
    try:
        return float(finished(EXPERIMENT).summary()["time_to_first_step_seconds"])
    finally:
        del os.environ["LABKIT_STANDBY"]


def accelerate_launch() -> float:
    with tempfile.TemporaryDirectory() as folder:
        stamp = Path(folder, "stamp")
        # Two CPU processes start only by way of --multi_gpu: with --cpu, accelerate launches a single one.
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        command += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        begun = time.monotonic()
        command += [SCRIPT, "accelerate", str(stamp)]
        subprocess.run(command, check=True, capture_output=True, env=environment(), timeout=120)
        return float(stamp.read_text()) - begun


def notebook_launcher() -> float:
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:  # given port 0, notebook_launcher waits for ever
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-c", NOTEBOOK, str(Path(SCRIPT).parent), str(Path(folder, "stamp")), str(port)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(), timeout=120)
        return float(answer.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def memory_of_standby() -> tuple[float, float]:
    """Resident and proportional memory of the waiting standby (MiB)."""
    text = Path(f"/proc/{client.standby_pid()}/smaps_rollup").read_text()
    sizes = {line.split()[0]: int(line.split()[1]) / 1024 for line in text.splitlines()[1:]}
    return sizes["Rss:"], sizes["Pss:"]


def main() -> int:
    options = arguments(__doc__ or "")
    labkit_warm()  # the first run also reads files from the disk
    cases = {
        "labkit, warm": labkit_warm,
        "labkit, cold": labkit_cold,
        "accelerate launch": accelerate_launch,
        "notebook_launcher": notebook_launcher,
    }
    figures = interleave(cases, options.repeats)
    rss, pss = memory_of_standby()
    rows = [(name, median_and_range(values) + " s") for name, values in figures.items()]
    rows.append(("memory of the standby", f"{rss:.0f} MiB resident, {pss:.0f} MiB proportional"))
    warm, ordinary = (statistics.median(figures[name]) for name in ("labkit, warm", "accelerate launch"))
    claims = [
        ("warm click to first step (s)", warm, "<=", 0.5),
        ("share of accelerate launch", warm / ordinary, "<=", 1 / 20),
    ]
    return report("Start-up, 2 ranks, vision recipe", rows, claims, options, figures | {"standby_mib": [rss, pss]})


if __name__ == "__main__":
    raise SystemExit(main())
