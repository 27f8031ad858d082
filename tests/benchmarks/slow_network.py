"""Methods on links of several rates: step time, bytes, loss at equal samples, time to the loss that plain DDP reaches.

Two ranks with one thread each, 5.3 million weights (21 MB of gradient). The link is a private network namespace with a
token bucket (launch.network): the same host, real packets.

1. Short runs of every method at every rate: seconds per update. Compressors work from the second update on.
2. Runs of every method over the same samples, at native speed: the gap in loss, with compressors beginning when they
   do by default; and bytes per update and rank, of the last hundred updates.
3. Runs to the end at the rate of the claims, of plain averaging and of the methods that are cheap there: the time until
   the loss is within 2 % of where plain averaging ends. A method whose updates are cheaper is free to make more of
   them: up to half as many again. Compressors begin after 5 updates.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from _common import arguments, finished, interleave, report

from labkit.experiment import Experiment
from labkit.experiment.registry import registry
from labkit.runs import Run
from labkit.runs.target import default_target, final_loss, reached

RATES = (None, 1000, 200, 100)
CLAIMED = 200
PERIOD = 10
"""Updates in which the local methods send once."""
WHOLE, LONGER = 300, 450
COMPRESSORS: dict[str, dict[str, Any]] = {
    "fp16": {"method": "fp16"},
    "bf16": {"method": "bf16"},
    "int8": {"method": "int8"},
    "ternary": {"method": "ternary"},
    "sign": {"method": "sign"},
    "topk 1 %": {"method": "topk", "ratio": 0.01},
    "randomk": {"method": "randomk"},
    "powersgd r=4": {"method": "powersgd", "rank": 4},
    "onebit_adam": {"method": "onebit_adam"},
}
LOCALS: dict[str, dict[str, Any]] = {
    "local_sgd": {"method": "local_sgd", "every": PERIOD},
    "post_local_sgd": {"method": "post_local_sgd", "every": PERIOD},
    "diloco": {"method": "diloco", "every": PERIOD},
    "streaming_diloco": {"method": "streaming_diloco", "every": PERIOD, "fragments": 4},
}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation 4": {"gradients.accumulation": 4},
    "delayed": {"gradients.update": {"method": "delayed"}},
    "parameter_server": {"gradients.update": {"method": "parameter_server"}},
    "gossip": {"gradients.update": {"method": "gossip"}},
}
METHODS = [*OTHERS, *COMPRESSORS, *LOCALS]
FASTER = {"fp16": 1.8, "int8": 3.0, "sign": 8.0, "topk 1 %": 7.0, "powersgd r=4": 12.0}
TO_TARGET = ("plain", "sign", "topk 1 %", "powersgd r=4", "local_sgd", "diloco", "streaming_diloco")


def experiment(method: str, rate: float | None, steps: int, start: int | None) -> Experiment:
    """`start`: after how many updates a compressor begins that need not begin at once; None: its default."""
    base = Experiment().set(
        {
            "name": f"{method} at {rate or 'native'}",
            "workload": {"name": "custom", "path": f"{Path(__file__).with_name('_wide_task.py')}:make"},
            "layout.dp_replicate": 2,
            "training.steps": steps,
            "training.global_batch": 128,
            "training.evaluate_every": steps if steps >= WHOLE else 0,
            "training.checkpoint_every": 0,
            "training.trace_step": 0,
            "optimizer.lr": 1e-3,
            "optimizer.warmup_steps": 5,
            "launch.transport": "network",  # at native speed too, so that columns compare
            "launch.network": None if rate is None else {"rate_mbit": rate},
        }
    )
    if method in OTHERS:
        return base.set(OTHERS[method])
    if method in LOCALS:
        begins_at_once = {"switch": 0.0} if method == "post_local_sgd" and steps < WHOLE else {}
        return base.set({"gradients.update": LOCALS[method] | begins_at_once})
    options = COMPRESSORS[method]
    if "start_step" in registry("gradients.compression")[options["method"]].load().Options.model_fields:
        options = options | {"start_step": start}
    return base.set({"gradients.compression": options})


def step_seconds(method: str, rate: float | None) -> float:
    """Per update: the median, or the mean where not all updates are alike."""
    uneven = method in (*LOCALS, "parameter_server", "gossip")
    run = finished(experiment(method, rate, 2 * PERIOD if uneven else 9, 1))
    if not uneven:
        return float(run.summary()["step_seconds"]["median"])
    seconds = run.data().training_seconds
    return float(seconds[-1] - seconds[PERIOD - 1]) / PERIOD  # the second period: the first warms up


def main() -> int:
    options = arguments(__doc__ or "", repeats=1)
    short: dict[float | None, dict[str, float]] = {}
    for rate in RATES:
        print(f"link: {rate or 'native'}", file=sys.stderr, flush=True)
        cases = {method: lambda method=method, rate=rate: step_seconds(method, rate) for method in METHODS}
        short[rate] = {method: statistics.median(v) for method, v in interleave(cases, options.repeats).items()}
    equal: dict[str, Run] = {}
    for method in METHODS:
        equal[method] = finished(experiment(method, None, WHOLE, None))
        print(f"  same samples, {method}: {final_loss(equal[method].data()):.4f}", file=sys.stderr, flush=True)
    whole: dict[str, Run] = {}
    for method in TO_TARGET:
        whole[method] = finished(experiment(method, CLAIMED, WHOLE if method == "plain" else LONGER, 5))
        seconds = whole[method].data().training_seconds[-1]
        print(f"  at {CLAIMED} Mbit/s, {method}: {seconds:.1f} s", file=sys.stderr, flush=True)

    target = default_target(whole["plain"].data())
    assert target is not None
    plain_held_out = equal["plain"].summary()["metrics"]["loss"]
    plain_loss = final_loss(whole["plain"].data()) or 0.0
    rows, figures = [], {}
    for method in METHODS:
        summary = equal[method].summary()
        sent, data, run = summary["communication"], equal[method].data(), whole.get(method)
        at = reached(run.data(), target) if run else None
        link = run.summary() if run else None
        figures[method] = measured = {
            "ms_per_step": {str(rate or "native"): 1000 * short[rate][method] for rate in RATES},
            "bytes_per_step": float(data.sent[-100:].mean()) / 2,
            "formula_of_counted": sent["formula_bytes_per_step"] / sent["counted_bytes_per_step"],
            "loss": final_loss(data),
            "loss_gap": (final_loss(data) or 0.0) / (final_loss(equal["plain"].data()) or 1.0) - 1,
            "held_out_gap": summary["metrics"]["loss"] / plain_held_out - 1,
            "accuracy": summary["metrics"]["accuracy"],
            "seconds_to_target": at and at.seconds,
            "steps_to_target": at and at.step,
            "loss_at_the_end": run and final_loss(run.data()),
            "kernel_of_counted": link
            and link["network"]["bytes_per_step"] / link["communication"]["counted_bytes_of_all_ranks"],
        }
        step_times = " ".join(f"{milliseconds:6.0f}" for milliseconds in measured["ms_per_step"].values())
        to = "; target not reached" if run else ""
        if at:
            to = f"; target after {at.seconds:.1f} s, step {at.step}"
        rows.append(
            (
                method,
                f"{step_times} ms/step; {measured['bytes_per_step'] / 1e6:6.3f} MB; loss {measured['loss_gap']:+6.1%}, "
                f"held out {measured['held_out_gap']:+6.1%}{to}",
            )
        )
    claims = [
        (f"{method} at {CLAIMED} Mbit/s, per step", short[CLAIMED]["plain"] / short[CLAIMED][method], ">=", bound)
        for method, bound in FASTER.items()
    ]
    to_target = {name: measured["seconds_to_target"] for name, measured in figures.items()}
    for group, what, bound in ((COMPRESSORS, "compressor", 8.0), (LOCALS, "local method", 10.0)):
        fit = {name: to_target["plain"] / to_target[name] for name in group if to_target[name]}
        best = max(fit, key=lambda name: fit[name], default="none")
        claims.append((f"best {what} to the target loss ({best})", fit.get(best, 0.0), ">=", bound))
        end = figures[best]["loss_at_the_end"] if best in figures else float("inf")
        claims.append((f"its loss at the end ({best})", end / plain_loss, "<=", 1.02))
    most = max(measured["kernel_of_counted"] for measured in figures.values() if measured["kernel_of_counted"])
    claims.append(("bytes that the kernel counted, of those that the methods counted", most, "<=", 1.05))
    slower = [name for name in METHODS if short[None][name] > short[None]["plain"]]
    rows.append(("slower than plain at native speed", ", ".join(slower) or "none"))
    title = (
        f"Slow link, 2 ranks, 21 MB of gradient; ms/step at native, {', '.join(f'{r:g}' for r in RATES if r)} Mbit/s"
    )
    return report(title, rows, claims, options, {"target": target, "methods": figures})


if __name__ == "__main__":
    raise SystemExit(main())
