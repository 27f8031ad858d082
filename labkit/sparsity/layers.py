"""Selection of the weights that a method may make zero: those of linear layers, convolutions and experts."""

from __future__ import annotations

from torch import nn

from labkit.workloads.base import Blocks
from labkit.workloads.models.experts import Experts

Shape = tuple[int, ...]


def prunable(model: nn.Module, ends: bool = False) -> dict[str, Shape]:
    """Return names and shapes of the prunable weights, in the order of the layers.

    Without `ends` the first and the last layer stay dense, as is usual: they have few weights, each of which matters
    (Evci et al. 2020; Gale et al. 2019, arXiv:1902.09574). In a chain of blocks these are its first and last block.
    Embeddings stay dense, and so do tied weights and those under weight normalisation.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shapes: dict[str, Shape] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            layer = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, Experts)) and parameter.dim() >= 2
            if name.endswith(("weight_g", "weight_v")):
                # Weight normalisation divides by the norm of a row, which must not become zero. Its newer form keeps
                # these parameters outside the layer, where this loop does not see them.
                continue
            if layer and parameter.requires_grad and len(names[id(parameter)]) == 1:
                shapes[name] = tuple(parameter.shape)
    if ends:
        return shapes
    if isinstance(model, Blocks):
        blocks = list(model.blocks)
        outer = tuple(f"blocks.{name}." for name in (blocks[0], blocks[-1]))
        return {name: shape for name, shape in shapes.items() if not name.startswith(outer)}
    return dict(list(shapes.items())[1:-1])
