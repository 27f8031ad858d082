"""labkit's own loop on one GPU: `python -m tests.gpu.speed OUT.jsonl [SIZE …]`, beside tests.gpu.by_hand.

Every way to train is a real run of labkit at a size that fills the card. Model FLOPs as in by_hand; the figure to look
at is the rate over the card's product rate in bf16 (`mfu`). Each line is one run; lines that are there are not run
again. Speeds of runs are compared on one machine only.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment, ExperimentError
from labkit.launch import launch
from tests.gpu.by_hand import SIZES, model_flops

STEPS = 24
VARIANTS = {
    "bf16": "quantization.training=bf16",
    "bf16, not compiled": "quantization.training=bf16 launch.compile=off",
    "pure_bf16": "quantization.training=pure_bf16",
    "bf16, 8-bit AdamW": "quantization.training=bf16 optimizer.state_bits=8",
    "fp8": "quantization.training=fp8",
    "int8": "quantization.training=int8",
    "bf16, 2:4": "quantization.training=bf16 sparsity.method=n_m sparsity.kernel=semi_structured",
    "bf16, full checkpointing": "quantization.training=bf16 layout.activation_checkpointing=full",
    "fp32": "quantization.training=fp32",
    "bf16, 8 experts, 2 layers": "quantization.training=bf16 workload.experts=8 workload.depth=2",
}


def experiment_of(size: dict[str, int], changes: str, device: str = "cuda") -> Experiment:
    """Return the experiment: a GPT of this size on the language workload, nothing but training in it."""
    workload = {"name": "language", **{key: size[key] for key in ("width", "depth", "heads", "context")}}
    base = {
        "workload": workload,
        "training.steps": STEPS,
        "training.global_batch": size["batch"],
        "training.evaluate_every": 0,
        "training.checkpoint_every": 0,
        "training.trace_step": 0,
        "optimizer.clip_norm": 1.0,
        "optimizer.lr": 1e-4,
        "launch.device": device,
        "launch.timeout_s": 120,
        "launch.max_duration_s": 300,
    }
    return Experiment().set(base).replace(*changes.split())


def measure(name: str, variant: str, device: str = "cuda") -> dict[str, Any]:
    """Run one variant at one size and return its figures."""
    size = SIZES[name]
    begun = time.monotonic()
    row: dict[str, Any] = {"labkit": variant, "size": name}
    try:
        run = launch(experiment_of(size, VARIANTS[variant], device), baseline=None)
        run.result(320)
        summary, data = run.summary(), run.data()
        parameters = summary["parameters"] - size["context"] * size["width"]
        step = summary["step_seconds"]["median"]
        row |= {
            "parameters": parameters,
            "step_ms": round(1000 * step, 2),
            "first_step_s": round(summary["time_to_first_step_seconds"], 1),
            "tokens_per_second": round(size["batch"] * size["context"] / step),
            "loss": [round(float(data.loss[at]), 4) for at in (0, -1)],
            "peak_gib": [round(value / 2**30, 1) for value in summary["peak_memory_bytes"]],
            "effective": summary.get("effective"),
        }
        if "experts" not in variant:
            row["teraflops"] = round(model_flops(parameters, size) / step / 1e12, 1)
    except ExperimentError as error:
        row["refused"] = str(error)[:400]
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"[:800]
    return row | {"seconds": round(time.monotonic() - begun, 1)}


def main() -> int:
    """Measure what is missing in the file at the named sizes (0.4 B, if none is named; `tiny` runs on a CPU)."""
    out = Path(sys.argv[1])
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    have = {(row.get("labkit"), row["size"]) for row in rows}
    sizes, only = [text for text in sys.argv[2:] if text in SIZES] or ["0.4 B"], set(sys.argv[2:]) & set(VARIANTS)
    with out.open("a", buffering=1) as file:
        for size in sizes:
            for variant in only or VARIANTS:
                if (variant, size) not in have:
                    row = measure(size, variant, "cpu" if size == "tiny" else "cuda")
                    print(json.dumps(row, default=str), flush=True)
                    file.write(json.dumps(row, default=str) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
