"""Every kind of run on one GPU, beside what it must equal: `python -m tests.gpu.functional OUT.jsonl [--device cpu]`.

One rank: every number format, sparsity and model, whose first losses must be those of a CPU as far as the format
allows. Two ranks that share the GPU over gloo: every layout and way to combine gradients, beside one process on the
same GPU. Nothing here is a timing: runs share the GPU. The file has one JSON object per run; what it already holds is
not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment, ExperimentError
from labkit.launch import launch

BASE: dict[str, Any] = {
    "workload": {
        "name": "language",
        "width": 128,
        "depth": 2,
        "heads": 4,
        "context": 64,
        "max_characters": 60_000,
    },
    "training.steps": 16,
    "training.global_batch": 32,
    "training.evaluate_every": 16,
    "optimizer.clip_norm": 1.0,
    "launch.timeout_s": 60,
    "launch.max_duration_s": 150,
}
LLAMA = (
    '{"model_type":"llama","hidden_size":64,"intermediate_size":128,"num_hidden_layers":2,"num_attention_heads":4,'
    '"num_key_value_heads":2}'
)
ONE_RANK = [
    "",
    "quantization.training=fp64",
    "quantization.training=bf16",
    "quantization.training=fp16",
    "quantization.training=fp8",
    "quantization.training=pure_bf16",
    "quantization.training=int8",
    "quantization.training=bitnet",
    "quantization.training=int8_weights",
    "optimizer.state_bits=8",
    "quantization.after_training=int8_dynamic",
    "quantization.after_training=int8_static",
    "quantization.after_training=int8_weight_only",
    "quantization.qat=int8 quantization.after_training=int8_dynamic",
    "quantization.qat=int4 quantization.after_training=int4_weight_only",
    "workload.experts=4",
    "workload.experts=4 workload.capacity=1.5 workload.balance_loss=0.01",
    "sparsity.method=n_m quantization.training=bf16 sparsity.export=true",
    "sparsity.method=n_m sparsity.kernel=semi_structured quantization.training=bf16 sparsity.export=true",
    "sparsity.method=rigl sparsity.target=0.8 sparsity.every=4",
    "sparsity.method=block sparsity.target=0.5",
    "sparsity.method=structured sparsity.target=0.5 sparsity.export=true",
    "layout.activation_checkpointing=selective",
    "layout.activation_checkpointing=full",
    "training.loader_workers=2",
    "gradients.accumulation=4",
    f"workload.model=transformers workload.transformers_config={LLAMA}",
    "workload=vision workload.model=resnet",
    "workload=vision workload.model=vit",
    "workload=driving",
]
COMPRESSORS = ("fp16", "bf16", "int8", "sign", "ternary", "topk", "randomk", "powersgd", "onebit_adam")
UPDATES = ("local_sgd", "post_local_sgd", "diloco", "streaming_diloco", "delayed", "parameter_server", "gossip")
EXACT_LAYOUTS = [
    "layout=dp2",
    "layout=dp2 gradients.accumulation=2",
    "layout=shard2 layout.zero_stage=1",
    "layout=shard2 layout.zero_stage=2",
    "layout=shard2 layout.zero_stage=3",
    "layout=shard2 layout.zero_stage=3 layout.cpu_offload=true",
    "layout=tp2",
    "layout=tp2 layout.sequence_parallel=true",
    "layout=ep2 workload.experts=4",
    "layout=dp2 training.shares=speed",
    'layout=dp2 launch.slowdown={"1":3} training.shares=speed',
    "layout=tp2 sparsity.method=rigl sparsity.target=0.8",
    "layout=shard2 layout.zero_stage=3 layout.activation_checkpointing=full",
    "layout=dp2 optimizer.name=sgd optimizer.lr=0.1",
]
"""On two ranks that share the GPU; each computes what one process computes."""
TWO_RANKS = [
    "layout=dp2 quantization.training=fp16",
    "layout=dp2 quantization.training=bf16",
    "layout=dp2 quantization.training=int8",
    "layout=shard2 layout.zero_stage=3 quantization.training=bf16",
    "layout=pp2 layout.microbatches=4 layout.schedule=1f1b",
    "layout=cp2",
    *(f"layout=dp2 gradients.compression.method={method}" for method in COMPRESSORS),
    *(f"layout=dp2 gradients.update.method={method}" for method in UPDATES),
]


def experiment_of(changes: str, device: str) -> Experiment:
    """Return the experiment of a setting, written as after `--set`."""
    base = BASE
    if "workload=" in changes:
        name = changes.split("workload=")[1].split()[0]
        base = BASE | {"workload": {"name": name}}
        changes = " ".join(part for part in changes.split() if not part.startswith("workload="))
    return Experiment().set(base).replace(*changes.split(), f"launch.device={device}")


def without_layout(changes: str) -> str:
    """Return the same setting for one process."""
    dropped = ("layout", "gradients.compression", "gradients.update", "training.shares", "launch.slowdown")
    return " ".join(part for part in changes.split() if not part.startswith(dropped))


def run(kind: str, changes: str, device: str) -> dict[str, Any]:
    """Run one setting and return what a reader wants to know of it."""
    begun = time.monotonic()
    row: dict[str, Any] = {"kind": kind, "changes": changes, "device": device}
    try:
        handle = launch(experiment_of(changes, device), baseline=None)
        handle.result(200)
        data, summary = handle.data(), handle.summary()
        row |= {
            "loss": [float(value) for value in data.loss],
            "evaluation": data.evaluations[-1][2] if data.evaluations else None,
            "step_ms": 1000 * summary["step_seconds"]["median"],
            "peak_mib": [round(value / 2**20) for value in summary.get("peak_memory_bytes") or []],
            "effective": summary.get("effective"),
            "notes": summary.get("notes"),
        }
    except ExperimentError as error:
        row["refused"] = str(error)[:600]
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"[:1500]
    return row | {"seconds": round(time.monotonic() - begun, 1)}


def jobs(device: str) -> list[tuple[str, str, str]]:
    """List what is run: (kind, changes, device)."""
    beside = dict.fromkeys(without_layout(changes) for changes in EXACT_LAYOUTS)
    listed = [("one rank", changes, device) for changes in ONE_RANK]
    if device != "cpu":
        listed += [("one rank, CPU", changes, "cpu") for changes in ("", "quantization.training=fp64")]
    listed += [("beside", changes, device) for changes in beside if changes not in ONE_RANK]
    listed += [("exact", changes, device) for changes in EXACT_LAYOUTS]
    return listed + [("two ranks", changes, device) for changes in TWO_RANKS]


def main() -> int:
    """Run what is missing in the file, then print a line per run; exit 1 if one failed or an exact one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--side-by-side", type=int, default=6)
    parser.add_argument("--only", default="", help="run settings that contain this text")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    have = {(row["kind"], row["changes"], row["device"]) for row in rows}
    todo = [job for job in jobs(given.device) if job not in have and given.only in job[1]]
    with ThreadPoolExecutor(given.side_by_side) as pool, given.out.open("a", buffering=1) as file:
        for row in pool.map(lambda job: run(*job), todo):
            rows.append(row)
            file.write(json.dumps(row, default=str) + "\n")
    return report(rows, given.device)


def report(rows: list[dict[str, Any]], device: str) -> int:
    """Print a line per run; 1 if one failed or an exact one differs from one process."""
    single = {row["changes"]: row for row in rows if row["device"] == device and row["kind"] != "exact"}
    wrong = 0
    for row in rows:
        gap = ""
        reference = single.get(without_layout(row["changes"]))
        if "loss" in row and reference and "loss" in reference and reference is not row:
            pairs = zip(row["loss"], reference["loss"], strict=False)
            difference = max(abs(mine - other) for mine, other in pairs)
            gap = f"largest difference of a loss {difference:.1e}"
            wrong += row["kind"] == "exact" and difference > 2e-3
        if "failed" in row:
            wrong += 1
        told = row.get("failed") or row.get("refused") or ""
        state = "FAILED" if "failed" in row else "refused" if "refused" in row else "ok"
        curve = row.get("loss") or []
        losses = " … ".join(f"{value:.4f}" for value in (curve[:1] + curve[-1:]))
        print(f"{state:<8}{row['kind']:<14}{row['changes'] or 'plain'}: {losses} {gap} {told} ({row['seconds']} s)")
    print(f"{len(rows)} runs, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
