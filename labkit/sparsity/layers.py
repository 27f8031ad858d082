"""Which weights a method may make zero: those of linear layers, convolutions and experts."""

from __future__ import annotations

from torch import nn

from labkit.workloads.base import Blocks
from labkit.workloads.models.experts import Experts

Shape = tuple[int, ...]


def prunable(model: nn.Module, ends: bool = False) -> dict[str, Shape]:
    """Names and shapes of these weights, in the order of the layers.

    Without `ends` the first and the last layer stay dense, as is usual: they hold few weights, and much hangs on each
    (Evci et al. 2020; Gale et al. 2019, arXiv:1902.09574). In a chain of blocks those are its first and last block.
    Embeddings stay dense, and so do tied weights and those under weight normalisation.
    """
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    found: dict[str, Shape] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            layer = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, Experts)) and parameter.dim() >= 2
            if name.endswith(("weight_g", "weight_v")):
                # Weight normalisation divides by the norm of a row, which must not become zero. Its newer form keeps
                # these parameters outside the layer, where they are not looked for.
                continue
            if layer and parameter.requires_grad and len(places[id(parameter)]) == 1:
                found[name] = tuple(parameter.shape)
    if ends:
        return found
    if isinstance(model, Blocks):
        blocks = list(model.blocks)
        outer = tuple(f"blocks.{name}." for name in (blocks[0], blocks[-1]))
        return {name: shape for name, shape in found.items() if not name.startswith(outer)}
    return dict(list(found.items())[1:-1])
