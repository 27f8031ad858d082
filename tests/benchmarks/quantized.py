"""Narrow numbers: what they save and what they cost.

1. Steps of 5.3 million weights in wide layers, one rank with one thread, 512 samples: float32, autocast to bfloat16,
   pure bfloat16, int8 products (three, and two).
2. The recipes in bfloat16 and in float32 on the same seeds: the gap in accuracy (of language, in the held-out loss).
3. Three layers of 1024, trained or not, after conversion to int8 with dynamic inputs: latency beside float32 at
   batches of 1, 32 and 512. One thread.
4. The language recipe converted to int4, its last layer too: loss of conversion without and with quantization-aware
   training, on several seeds; recovered is the part of the loss that training for the grid takes back.
5. Moments of 8 bits: bytes beside those of 32 bits, and the held-out loss.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from _common import arguments, finished, interleave, median_and_range, ratios, report

from labkit.experiment import Experiment, Machine
from labkit.experiment.recipes import recipe
from labkit.quantization.rules import BF16_FLAGS

STEPS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"quantization.training": "bf16"},
    "pure_bf16": {"quantization.training": "pure_bf16"},
    "int8": {"quantization.training": "int8"},
    "int8, two products": {"quantization.training": "int8", "quantization.weight_gradient": False},
}
SEEDS = (0, 1, 2)
MORE_SEEDS = (0, 1, 2, 3, 4, 5)
"""Where a difference of a few thousandths is looked at."""
QAT_START = 0.8
"""Training for the grid as fine-tuning at the end: of 0, 0.25, 0.5 and 0.8 the best on the first three seeds."""
BATCHES = (1, 32, 512)
RECIPES = ("vision-ddp", "language-ddp")


PRODUCTS: dict[str, float] = {}
"""Products of int8 matrices per update, counted where they are made, by what was run."""


def wide(name: str) -> float:
    """Median seconds of an update."""
    base = Experiment().set(
        {
            "workload": {"name": "custom", "path": f"{Path(__file__).with_name('_wide_task.py')}:make"},
            "training.steps": 14,
            "training.global_batch": 512,
            "training.evaluate_every": 0,
            "training.checkpoint_every": 0,
            "training.trace_step": 0,
        }
    )
    summary = finished(base.set(STEPS[name])).summary()
    PRODUCTS[name] = float(summary["effective"].get("int8_products", 0))
    return float(summary["step_seconds"]["median"])


def latency(kind: str, size: int) -> float:
    """Median seconds of a forward pass."""
    import torch
    from torch import nn

    from labkit.quantization.calibration import magnitudes
    from labkit.quantization.converted import convert

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(1024, 1024), nn.ReLU())))
    if kind != "fp32":
        layers = [str(at) for at in (0, 2, 4)]
        seen = magnitudes(model, layers, [torch.randn(256, 1024)], 0.9999, lambda: None)
        convert(model, kind, head=True, largest=seen)
    x, seconds = torch.randn(size, 1024), []
    with torch.no_grad():
        for _ in range(5 + 2000 // (10 + size)):
            begun = time.perf_counter()
            model(x)
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[3:])


def trained(name: str, seed: int, **change: Any) -> dict[str, Any]:
    """The summary of a whole recipe."""
    print(f"  {name}, seed {seed}, {change or 'fp32'}", file=sys.stderr, flush=True)
    settings = {key.replace("__", "."): value for key, value in change.items()}
    return finished(recipe(name).set({"training.seed": seed} | settings)).summary()


def main() -> int:
    options = arguments(__doc__ or "", repeats=5)
    steps = interleave({name: lambda name=name: wide(name) for name in STEPS}, options.repeats)
    rows = [
        (
            f"step, {name}",
            f"{1000 * statistics.median(seconds):.1f} ms, {median_and_range(ratios(steps, 'fp32', name))} × fp32, "
            f"{median_and_range(ratios(steps, 'bf16', name))} × bf16, {PRODUCTS[name]:g} int8 products",
        )
        for name, seconds in steps.items()
    ]
    claims = [("int8 products per update", PRODUCTS["int8"], ">=", 1)]
    if Machine.here().cpu_flags & BF16_FLAGS:
        claims.append(("steps of bf16 over fp32", statistics.median(ratios(steps, "fp32", "bf16")), ">=", 1.6))

    gaps: dict[str, list[float]] = {}
    plain: dict[tuple[str, int], dict[str, Any]] = {}
    for name in RECIPES:
        for seed in SEEDS:
            plain[name, seed] = trained(name, seed)
            half = trained(name, seed, quantization__training="bf16")["metrics"]
            full = plain[name, seed]["metrics"]
            gap = full["accuracy"] - half["accuracy"] if "accuracy" in full else half["loss"] / full["loss"] - 1
            gaps.setdefault(name, []).append(gap)
        what = "accuracy" if "accuracy" in full else "held-out loss, relative,"
        rows.append((f"{what} lost in bf16, {name}", median_and_range(gaps[name])))
        claims.append((f"{what} lost in bf16, {name}, mean", statistics.mean(gaps[name]), "<=", 0.003))

    faster: dict[str, list[float]] = {}
    for size in BATCHES:
        kinds = ("fp32", "int8_dynamic", "int8_static", "int8_weight_only", "int4_weight_only")
        latencies = interleave(
            {kind: lambda kind=kind, size=size: latency(kind, size) for kind in kinds}, options.repeats
        )
        for kind in kinds[1:]:
            faster[f"{kind} {size}"] = ratios(latencies, "fp32", kind)
            rows.append((f"{kind}, batch {size}", f"{median_and_range(faster[f'{kind} {size}'])} × fp32"))
    claims.append(("int8 dynamic, batch 512, over fp32", statistics.median(faster["int8_dynamic 512"]), ">=", 2.5))

    recovered = []
    losses: list[dict[str, float]] = []
    for seed in MORE_SEEDS:
        four = {"quantization__after_training": "int4_weight_only", "quantization__head": True}
        without = trained("language-ddp", seed, **four)["quantized"]["metrics"]
        aware = trained("language-ddp", seed, quantization__qat="int4", quantization__qat_start=QAT_START, **four)
        losses_of_seed = {
            "float": without["float"]["loss"],
            "converted": without["quantized"]["loss"],
            "aware": aware["quantized"]["metrics"]["quantized"]["loss"],
        }
        losses.append(losses_of_seed)
        gained = losses_of_seed["converted"] - losses_of_seed["aware"]
        recovered.append(gained / (losses_of_seed["converted"] - losses_of_seed["float"]))
        rows.append((f"int4, seed {seed}", ", ".join(f"{name} {loss:.4f}" for name, loss in losses_of_seed.items())))
    rows.append(("recovered by training for int4", median_and_range(recovered)))
    claims.append(("recovered by training for int4, mean", statistics.mean(recovered), ">=", 1 / 2))

    sizes, lost = [], []
    for seed in SEEDS:
        eight, whole = trained("language-ddp", seed, optimizer__state_bits=8), plain["language-ddp", seed]
        sizes.append(eight["memory"]["measured"][0]["optimizer"] / whole["memory"]["measured"][0]["optimizer"])
        lost.append(eight["metrics"]["loss"] / whole["metrics"]["loss"] - 1)
    rows.append(("state of 8 bits over 32", median_and_range(sizes)))
    rows.append(("held-out loss with it, relative", median_and_range(lost)))
    claims.append(("state of 8 bits over 32", max(sizes), "<=", 0.3))
    claims.append(("held-out loss with it, relative, mean", statistics.mean(lost), "<=", 0.02))
    data = {
        "steps": steps,
        "int8_products": PRODUCTS,
        "accuracy_gaps": gaps,
        "faster": faster,
        "int4": losses,
        "recovered": recovered,
        "state": sizes,
        "state_loss": lost,
    }
    return report("Narrow numbers", rows, claims, options, data)


if __name__ == "__main__":
    raise SystemExit(main())
