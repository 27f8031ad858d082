"""The trained sparse network in each form that exploits its zeros, compared with the dense form.

Rank 0 makes these forms from a copy of the full model after the last step and measures metrics, bytes and latency (on
this rank with its number of threads). The form that is fastest at the largest batch is written to the run directory
(labkit.sparsity.export).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.experiment.sections import Sparsity
from labkit.quantization.converted import num_bytes
from labkit.sparsity import export as forms
from labkit.training.after.variants import BATCHES, evaluated, inputs, latency, unwrap_copy
from labkit.workloads.base import Task


@torch.no_grad()
def export(
    task: Task, model: nn.Module, settings: Sparsity, path: Path, heartbeat: Callable[[], None]
) -> dict[str, Any]:
    """Write the fastest form to `path`; return the fields of the event `exported`. `heartbeat` is called regularly."""
    dense = unwrap_copy(model)
    device = next(dense.parameters()).device
    variants, layers = {"dense": dense}, {"dense": 0}
    if settings.method == "structured":
        variants["smaller"] = forms.as_smaller(dense)
        layers["smaller"] = _changed(dense, variants["smaller"])
    if names := forms.layers_with_two_four(dense):
        variants |= {"dense_16": forms.as_half(dense, names, False), "two_four": forms.as_half(dense, names, True)}
        layers |= {"dense_16": len(names), "two_four": len(names)}
    seconds: dict[str, dict[str, float]] = {}
    as_csr: dict[str, int] = {}
    for size in BATCHES:
        x = inputs(task, size, device)
        names = forms.faster_as_csr(dense, x, heartbeat)
        as_csr[str(size)] = len(names)
        timed_variants = dict(variants)
        if names:  # the form of the largest batch size that gains from CSR is evaluated below
            timed_variants["csr"] = csr = forms.as_csr(dense, names)
            layers["csr"] = len(names)
        seconds[str(size)] = latency(timed_variants, x, heartbeat)
    if "csr" in layers:
        variants["csr"] = csr
    fastest = {size: min(by_form, key=lambda form: by_form[form]) for size, by_form in seconds.items()}
    chosen = fastest[str(BATCHES[-1])]
    count = len(task.test)
    return {
        "samples": count,
        "metrics": {form: evaluated(task, variant, device, count, heartbeat) for form, variant in variants.items()},
        "bytes": {form: num_bytes(variant) for form, variant in variants.items()},
        "layers": layers,
        "csr_layers": as_csr,
        "latency_seconds": seconds,
        "fastest": fastest,
        "saved": chosen,
        "file_bytes": forms.save(path, variants[chosen], chosen),
    }


def _changed(dense: nn.Module, smaller: nn.Module) -> int:
    """Return the number of linear layers whose weight shapes differ."""
    pairs = zip(dense.modules(), smaller.modules(), strict=True)
    return sum(isinstance(a, nn.Linear) and a.weight.shape != b.weight.shape for a, b in pairs)
