"""Calibration: the magnitudes of layers' inputs, which static quantization needs to choose its scales.

A few samples are run through the network, and a quantile of the magnitudes of each layer's inputs determines the step
of its grid. A quantile just below 1 clips rare outliers and so leaves finer steps for all other inputs (Jacob et al.
2018, arXiv:1712.05877; for the best quantile see Wu et al. 2020, arXiv:2004.09602).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

MOST_NUMBERS = 1 << 20
"""Maximum number of elements of an input from which a quantile is computed; more are subsampled evenly."""


@torch.no_grad()
def magnitudes(
    model: nn.Module, names: Sequence[str], batches: Iterable[Tensor], quantile: float, heartbeat: Callable[[], None]
) -> dict[str, float]:
    """Return by layer the `quantile` (0 to 1; 1 is the maximum) of the magnitudes of its inputs, maximal over batches.

    `heartbeat` is called before every batch.
    """
    largest = dict.fromkeys(names, 0.0)

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest[name], _quantile(inputs[0].abs().flatten(), quantile))

        return record

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        for batch in batches:
            heartbeat()
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def _quantile(values: Tensor, quantile: float) -> float:
    if quantile == 1 or not len(values):
        return float(values.amax()) if len(values) else 0.0
    every = -(-len(values) // MOST_NUMBERS)
    sample = values[::every].float()
    return float(sample.kthvalue(max(1, round(quantile * len(sample)))).values)
