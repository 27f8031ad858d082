"""Sparse layers on CPUs: what the kernel gives, layer by layer and over a whole training run.

1. Forward, backward and update of wide blocks, dense (fp32, bf16 under autocast, masked) and with CSR kernels at
   several sparsities, on one and two threads. The topology stands still.
2. Whole runs of a wide network on the digits (_wide_task.py, a middle layer of 2,048 x 2,048 and one of 256 x 2,048),
   dense, masked and with CSR, with RigL's changes of topology in the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import arguments, finished, interleave, median_and_range, ratios, report
from torch import nn

from labkit.experiment import Experiment
from labkit.sparsity.choose import random_mask
from labkit.sparsity.csr import CsrLinear

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
REQUIRED = {0.9: 1.8, 0.95: 3.0, 0.98: 5.0}
THREADS = (1, 2)
STEPS = 300


class Masked(nn.Module):
    """What most code for sparse training does: a dense weight times a mask, in every pass."""

    def __init__(self, layer: nn.Linear, mask: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("mask", mask.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def mlp() -> tuple[nn.Sequential, torch.Tensor]:
    """Three square layers."""
    layers = [nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 2048)]
    return nn.Sequential(*layers), torch.randn(256, 2048)


def feed_forward() -> tuple[nn.Sequential, torch.Tensor]:
    """The MLP of a GPT of width 768, on 256 tokens."""
    return nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)), torch.randn(256, 768)


def changed(model: nn.Sequential, make: Callable[[nn.Linear, torch.Tensor], nn.Module], sparsity: float) -> nn.Module:
    """With other linear layers, of random masks."""
    for at, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            shape = (layer.out_features, layer.in_features)
            kept = round((1 - sparsity) * layer.weight.numel())
            model[at] = make(layer, random_mask(shape, kept, at))
    return model


def step(model: nn.Module, x: torch.Tensor, bf16: bool = False) -> Callable[[], float]:
    """A training step, timed (s)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> float:
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    run()
    return run


def kernels(repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step, by block and threads, by kernel."""
    seconds = {}
    for name, block in {"MLP 3 x 2,048²": mlp, "GPT feed-forward 768": feed_forward}.items():
        for threads in THREADS:
            torch.set_num_threads(threads)
            cases = {"dense": step(*block()), "dense bf16": step(*block(), bf16=True)}
            for sparsity in SPARSITIES:
                model, x = block()
                cases[f"csr {sparsity:.0%}"] = step(changed(model, CsrLinear, sparsity), x)
            model, x = block()
            cases["masked 90%"] = step(changed(model, Masked, 0.9), x)
            seconds[f"{name}, {threads} thread{'s' * (threads > 1)}"] = interleave(cases, repeats)
    return seconds


def experiment(kernel: str | None) -> Experiment:
    sparsity: dict[str, Any] = {"method": "none"}
    if kernel is not None:
        sparsity = {"method": "rigl", "target": 0.95, "kernel": kernel, "every": 100}
    return Experiment().set(
        {
            "workload": {"name": "custom", "path": f"{Path(__file__).with_name('_wide_task.py')}:make"},
            "training.steps": STEPS,
            "training.global_batch": 256,
            "training.evaluate_every": STEPS,
            "training.checkpoint_every": 0,
            "training.trace_step": 0,
            "optimizer.lr": 1e-3,
            "sparsity": sparsity,
        }
    )


def main() -> int:
    options = arguments(__doc__ or "", repeats=7)
    blocks = kernels(options.repeats)
    accuracy: dict[str, float] = {}

    def whole(kernel: str | None) -> float:
        run = finished(experiment(kernel))
        accuracy[kernel or "none"] = run.summary()["metrics"]["accuracy"]
        return float(run.data().training_seconds[-1])

    runs = interleave({kernel or "none": lambda kernel=kernel: whole(kernel) for kernel in (None, "dense", "csr")}, 3)
    rows, claims = [], []
    for name, figures in blocks.items():
        for case, seconds in figures.items():
            fp32, bf16 = (median_and_range(ratios(figures, dense, case)) for dense in ("dense", "dense bf16"))
            text = f"{1000 * statistics.median(seconds):7.1f} ms; faster than fp32 {fp32}, than bf16 {bf16}"
            rows.append((f"{name}: {case}", text))
        for sparsity, bound in REQUIRED.items():
            speedup = statistics.median(ratios(figures, "dense", f"csr {sparsity:.0%}"))
            claims.append((f"{name}: CSR at {sparsity:.0%} over dense fp32", speedup, ">=", bound))
        claims.append(
            (f"{name}: masked over dense", statistics.median(ratios(figures, "dense", "masked 90%")), "<=", 1.05)
        )
    for kernel, seconds in runs.items():
        rows.append(
            (
                f"{STEPS} updates, RigL 95 %, kernel {kernel}",
                f"{median_and_range(seconds)} s, accuracy {accuracy[kernel]:.1%}",
            )
        )
    claims.append(("whole run at 95 %, CSR over dense", statistics.median(ratios(runs, "none", "csr")), ">=", 1.8))
    return report("Sparse layers", rows, claims, options, {"blocks": blocks, "runs": runs, "accuracy": accuracy})


if __name__ == "__main__":
    raise SystemExit(main())
