"""How large the inputs of layers get: what static quantization has to know before it can round them.

A few samples are run through the network, and of each layer's inputs a quantile of the magnitudes is kept: the step of
its grid follows from it. A little less than the largest clips rare outliers and so leaves finer steps for all others
(Jacob et al. 2018, arXiv:1712.05877; which quantile is best: Wu et al. 2020, arXiv:2004.09602).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

MOST_NUMBERS = 1 << 20
"""Of so many numbers of an input a quantile is taken, evenly chosen."""


@torch.no_grad()
def magnitudes(
    model: nn.Module, names: Sequence[str], batches: Iterable[Tensor], quantile: float, alive: Callable[[], None]
) -> dict[str, float]:
    """By layer, the magnitude that `quantile` (0 to 1, 1: all) of its inputs do not exceed: the largest of all batches.

    `alive` is called before every batch.
    """
    found = dict.fromkeys(names, 0.0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = max(found[name], _quantile(inputs[0].abs().flatten(), quantile))

        return see

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        for batch in batches:
            alive()
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _quantile(values: Tensor, quantile: float) -> float:
    if quantile == 1 or not len(values):
        return float(values.amax()) if len(values) else 0.0
    every = -(-len(values) // MOST_NUMBERS)
    chosen = values[::every].float()
    return float(chosen.kthvalue(max(1, round(quantile * len(chosen)))).values)
