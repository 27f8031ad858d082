"""Steps after the training that the first rank takes with the trained network: quantization and export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from labkit.experiment.problem import Problem
from labkit.experiment.registry import registry

if TYPE_CHECKING:
    from labkit.experiment.schema import Experiment


def first_rank_problems(experiment: Experiment, field: str, off: str, verb: str, participle: str) -> Iterator[Problem]:
    """Yield the reasons why the first rank cannot process the trained model on its own.

    It needs the whole trained model, in layers that compute with the weights they store. `verb` and `participle` are
    used in the messages, as in "the first rank converts" and "those converted". `off` is the value of `field` that
    turns the step off.
    """
    layout, training = experiment.layout, experiment.quantization.training
    sharded_by = [axis for axis in ("tp", "pp", "ep", "cp") if getattr(layout, axis) > 1]
    if layout.dp_shard > 1 and layout.zero_stage == 3:
        sharded_by.append("ZeRO stage 3")
    if sharded_by:
        reason = f"the first rank {verb} the whole model, and with {' and '.join(sharded_by)} it has only a part of it"
        yield Problem(field, reason, off)
    if experiment.launch.isolated:
        yield Problem(field, "copies that do not train together have nothing to keep (launch.isolated)", off)
    if not registry("quantization.training")[training].load().computes_with_stored_weights:
        yield Problem(field, f"layers trained in {training} compute something other than those {participle}", off)


FORMS = {
    "dense": "dense",
    "csr": "CSR (non-zero weights only)",
    "smaller": "smaller layers",
    "dense_16": "dense in bfloat16",
    "two_four": "2:4 kernels in bfloat16",
}
"""Forms of a sparse network after training (labkit.sparsity.export) with their titles; the first is the baseline."""
