"""The kernels of GPUs for 2:4 sparsity: who has them, and what they ask of an experiment. Imports no torch.

Since Ampere (compute capability 8.0) tensor cores leave out two of every four weights along the inputs, whose places
come as 2 bits each (Mishra et al. 2021, arXiv:2104.08378): at most twice the products a second, on 9/16 of the bytes.
torch reaches them through cuSPARSELt or CUTLASS, in 16 bits and int8, for matrices with sides that are multiples of 16
or 32. two_four.py trains with them.
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
"""Compute capability of the first GPUs with them (A100)."""
FORMATS = ("bf16", "fp16")
"""Number formats for training whose products they know."""


def missing(machine: Machine) -> str:
    """Why this machine has no such kernels; empty if it should have them (a rank tries them before it trains)."""
    if not machine.gpus:
        return f"2:4 kernels need a GPU ({machine.gpu_reason})"
    if machine.capability is None or machine.capability < LEAST:
        found = "unknown" if machine.capability is None else ".".join(map(str, machine.capability))
        return f"2:4 kernels need a GPU of compute capability 8.0 or more, the least one here is {found}"
    return "" if machine.torch_cuda else "2:4 kernels need a build of torch for CUDA, this one is for CPUs"


def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Why N:M cannot train with them here."""
    options, layout = experiment.sparsity.options, experiment.layout
    reason = missing(machine)
    if reason or experiment.launch.device == "cpu":
        yield Problem(FIELD, reason or "2:4 kernels need a GPU (launch.device)", "dense")
    if (options["n"], options["m"]) != (2, 4):
        yield Problem(FIELD, f"GPUs have kernels for 2 of 4 weights, not for {options['n']} of {options['m']}", "dense")
    if experiment.quantization.training not in FORMATS:
        said = f"2:4 kernels multiply in 16 bits, and {experiment.quantization.training} does not"
        yield Problem("quantization.training", said, "bf16")
    if layout.world_size != layout.dp_replicate:
        yield Problem(
            FIELD, f"layers with 2:4 kernels are not cut or sharded over ranks, the layout is {layout}", "dense"
        )
