"""The trained sparse network in each form that makes use of its zeros, beside the dense one: metrics, bytes, latency.

Made by the first rank from a copy of the whole model, after the last update; latency is that of this rank with its
threads. What is fastest at the largest batch is written to the run directory (labkit.sparsity.export).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.experiment.schema import Sparsity
from labkit.quantization.converted import num_bytes
from labkit.sparsity import export as forms
from labkit.training.after.variants import BATCHES, bare, evaluated, inputs, latency
from labkit.workloads.base import Task


@torch.no_grad()
def export(task: Task, model: nn.Module, settings: Sparsity, path: Path, alive: Callable[[], None]) -> dict[str, Any]:
    """The fields of the event `exported`; writes the file `path`. `alive` is called again and again."""
    whole = bare(model)
    device = next(whole.parameters()).device
    made, layers = {"dense": whole}, {"dense": 0}
    if settings.method == "structured":
        made["smaller"] = forms.as_smaller(whole)
        layers["smaller"] = _changed(whole, made["smaller"])
    if names := forms.layers_with_two_four(whole):
        made |= {"dense_16": forms.as_half(whole, names, False), "two_four": forms.as_half(whole, names, True)}
        layers |= {"dense_16": len(names), "two_four": len(names)}
    seconds: dict[str, dict[str, float]] = {}
    as_csr: dict[str, int] = {}
    for size in BATCHES:
        x = inputs(task, size, device)
        names = forms.faster_as_csr(whole, x, alive)
        as_csr[str(size)] = len(names)
        now = dict(made)
        if names:  # of the largest batch for which a layer is faster so, this form is looked at further
            now["csr"] = csr = forms.as_csr(whole, names)
            layers["csr"] = len(names)
        seconds[str(size)] = latency(now, x, alive)
    if "csr" in layers:
        made["csr"] = csr
    fastest = {size: min(found, key=lambda form: found[form]) for size, found in seconds.items()}
    chosen = fastest[str(BATCHES[-1])]
    count = len(task.test)
    return {
        "samples": count,
        "metrics": {form: evaluated(task, one, device, count, alive) for form, one in made.items()},
        "bytes": {form: num_bytes(one) for form, one in made.items()},
        "layers": layers,
        "csr_layers": as_csr,
        "latency_seconds": seconds,
        "fastest": fastest,
        "saved": chosen,
        "file_bytes": forms.save(path, made[chosen], chosen),
    }


def _changed(whole: nn.Module, other: nn.Module) -> int:
    """How many linear layers have other sides."""
    pairs = zip(whole.modules(), other.modules(), strict=True)
    return sum(isinstance(a, nn.Linear) and a.weight.shape != b.weight.shape for a, b in pairs)
