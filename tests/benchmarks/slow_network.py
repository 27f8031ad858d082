"""Methods on links of several rates: step time, bytes, loss at equal samples, time to the loss that plain DDP ends at.

Two ranks with one thread each, 5.3 million weights (21 MB of gradient). The link is a private network namespace with a
token bucket (launch.network): the same host, real packets. First short runs at all rates, in turn; then, at the rate of
the claims, whole runs of everything, whose losses count.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from _common import arguments, finished, interleave, report

from labkit.experiment import Experiment
from labkit.runs.target import default_target, final_loss, reached

RATES = (None, 1000, 200, 100)
CLAIMED = 200
SHORT, WHOLE = 14, 120
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16": {"gradients.compression.method": "fp16"},
    "bf16": {"gradients.compression.method": "bf16"},
    "int8": {"gradients.compression.method": "int8"},
    "ternary": {"gradients.compression.method": "ternary"},
    "sign": {"gradients.compression.method": "sign"},
    "topk 1 %": {"gradients.compression.method": "topk", "gradients.compression.ratio": 0.01},
    "randomk": {"gradients.compression.method": "randomk"},
    "powersgd r=4": {"gradients.compression.method": "powersgd", "gradients.compression.rank": 4},
    "onebit_adam": {"gradients.compression.method": "onebit_adam"},
    "accumulation 4": {"gradients.accumulation": 4},
    "local_sgd H=8": {"gradients.update.method": "local_sgd"},
    "post_local_sgd": {"gradients.update.method": "post_local_sgd"},
    "diloco": {"gradients.update.method": "diloco"},
    "streaming_diloco": {"gradients.update.method": "streaming_diloco"},
    "delayed": {"gradients.update.method": "delayed"},
    "parameter_server": {"gradients.update.method": "parameter_server"},
    "gossip": {"gradients.update.method": "gossip"},
}
FASTER = {"fp16": 1.8, "int8": 3.0, "sign": 8.0, "topk 1 %": 7.0, "powersgd r=4": 12.0}
COMPRESSORS = ("fp16", "bf16", "int8", "ternary", "sign", "topk 1 %", "randomk", "powersgd r=4", "onebit_adam")
LOCALS = ("local_sgd H=8", "post_local_sgd", "diloco", "streaming_diloco")


def experiment(method: str, rate: float | None, steps: int) -> Experiment:
    base = Experiment().set(
        {
            "name": f"{method} at {rate or 'native'}",
            "workload": {"name": "custom", "path": f"{Path(__file__).with_name('_wide_task.py')}:make"},
            "layout.dp_replicate": 2,
            "training.steps": steps,
            "training.global_batch": 128,
            "training.evaluate_every": 0 if steps == SHORT else steps,
            "training.checkpoint_every": 0,
            "training.trace_step": 0,
            "optimizer.lr": 1e-3,
            "optimizer.warmup_steps": 5,
            "launch.transport": "network",  # at native speed too, so that columns compare
            "launch.network": None if rate is None else {"rate_mbit": rate},
        }
    )
    return base.set(METHODS[method])


def step_seconds(method: str, rate: float | None) -> float:
    """Per update, over whole periods of methods that do not send in every one."""
    summary = finished(experiment(method, rate, SHORT)).summary()
    return float(summary["step_seconds"]["median"])


def main() -> int:
    options = arguments(__doc__ or "", repeats=1)
    short: dict[float | None, dict[str, float]] = {}
    for rate in RATES:
        print(f"link: {rate or 'native'}", file=sys.stderr, flush=True)
        cases = {method: lambda method=method, rate=rate: step_seconds(method, rate) for method in METHODS}
        short[rate] = {method: statistics.median(v) for method, v in interleave(cases, options.repeats).items()}
    whole = {}
    for method in METHODS:
        run = finished(experiment(method, CLAIMED, WHOLE))
        whole[method] = (run.data(), run.summary())
        print(f"  whole run of {method}: {whole[method][0].elapsed[-1]:.1f} s", file=sys.stderr, flush=True)
    plain = whole["plain"][0]
    target, held_out = default_target(plain), whole["plain"][1]["metrics"]["loss"]
    assert target is not None
    rows, figures = [], {}
    for method, (data, summary) in whole.items():
        at = reached(data, target)
        steps = {str(rate or "native"): 1000 * short[rate][method] for rate in RATES}
        sent = summary["communication"] or {}
        figures[method] = {
            "ms_per_step": steps,
            "whole_ms_per_step": 1000 * summary["step_seconds"]["median"],
            "bytes_per_step": sent.get("counted_bytes_per_step"),
            "formula_bytes_per_step": sent.get("formula_bytes_per_step"),
            "link_bytes_per_step": (summary["network"] or {}).get("bytes_per_step"),
            "loss": final_loss(data),
            "held_out_loss": summary["metrics"]["loss"],
            "held_out_gap": summary["metrics"]["loss"] / held_out - 1,
            "accuracy": summary["metrics"]["accuracy"],
            "seconds_to_target": at and at.seconds,
            "steps_to_target": at and at.step,
        }
        said = " ".join(f"{steps[str(rate or 'native')]:7.0f}" for rate in RATES)
        size = figures[method]["bytes_per_step"]
        to = f"{at.seconds:6.1f} s, step {at.step:3}" if at else "     not reached"
        rows.append(
            (
                method,
                f"{said} ms/step; {(size or 0) / 1e6:7.3f} MB; loss {final_loss(data):.4f}, held out "
                f"{figures[method]['held_out_gap']:+.1%}; target {to}",
            )
        )
    claims = [
        (f"{method} at {CLAIMED} Mbit/s, per step", short[CLAIMED]["plain"] / short[CLAIMED][method], ">=", bound)
        for method, bound in FASTER.items()
    ]
    to_target = {name: one["seconds_to_target"] for name, one in figures.items()}
    for group, bound in ((COMPRESSORS, 8.0), (LOCALS, 10.0)):
        fit = {
            name: to_target["plain"] / to_target[name]
            for name in group
            if to_target[name] and figures[name]["loss"] <= 1.02 * figures["plain"]["loss"]
        }
        best = max(fit, key=lambda name: fit[name], default=None)
        what = f"best {'compressor' if group is COMPRESSORS else 'local method'} to the target loss ({best})"
        claims.append((what, fit[best] if best else 0.0, ">=", bound))
    slower = [name for name in METHODS if short[None][name] > short[None]["plain"]]
    rows.append(("slower than plain at native speed", ", ".join(slower) or "none"))
    title = (
        f"Slow link, 2 ranks, 21 MB of gradient; ms/step at native, {', '.join(f'{r:g}' for r in RATES if r)} Mbit/s"
    )
    return report(title, rows, claims, options, {"target": target, "methods": figures})


if __name__ == "__main__":
    raise SystemExit(main())
