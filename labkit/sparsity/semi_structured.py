"""GPU kernels for 2:4 sparsity: which machines have them, and what they require of an experiment. No torch import.

Since Ampere (compute capability 8.0) tensor cores can skip two of every four weights along the inputs; the indices of
the others take 2 bits each (Mishra et al. 2021, arXiv:2104.08378). That gives at most twice the products per second,
with 9/16 of the bytes. torch uses them through cuSPARSELt or CUTLASS, in 16 bits and int8, for matrices whose
dimensions are multiples of 16 or 32. two_four.py trains with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.experiment.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine

FIELD = "sparsity.kernel"
LEAST = (8, 0)
"""Compute capability of the first GPUs with these kernels (A100)."""
FORMATS = ("bf16", "fp16")
"""Precisions for training that these kernels support."""


def missing(machine: Machine) -> str:
    """Return why this machine has no 2:4 kernels; empty if it should have them (a rank tries them before it trains)."""
    reason = machine.lacks_capability("2:4 kernels need", LEAST)
    if reason or machine.torch_cuda:
        return reason
    return "2:4 kernels need a CUDA build of torch, this one is for CPUs"


def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield the reasons why N:M cannot train with 2:4 kernels here."""
    options, layout = experiment.sparsity.options, experiment.layout
    reason = missing(machine)
    if reason or experiment.launch.device == "cpu":
        yield Problem(FIELD, reason or "2:4 kernels need a GPU (launch.device)", "dense")
    if (options["n"], options["m"]) != (2, 4):
        yield Problem(FIELD, f"GPUs have kernels for 2 of 4 weights, not for {options['n']} of {options['m']}", "dense")
    if experiment.quantization.training not in FORMATS:
        reason = f"2:4 kernels multiply in 16 bits, and {experiment.quantization.training} does not"
        yield Problem("quantization.training", reason, "bf16")
    if layout.world_size != layout.dp_replicate:
        yield Problem(
            FIELD, f"layers with 2:4 kernels are not cut or sharded over ranks, the layout is {layout}", "dense"
        )
