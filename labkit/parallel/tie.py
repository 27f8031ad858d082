"""Tied weights in a pipeline: one weight in two places, and the places lie on different stages.

A GPT may use its token embedding as output layer (Press & Wolf 2017, arXiv:1608.05859). Each of the two stages then
holds a copy; the gradients of the copies are added up, so both make the same update and stay equal (as in Megatron-LM).
In a folded pipeline the two stages may lie on one rank: they still are two copies, and nothing has to travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel.cut import note
from labkit.parallel.mesh import Mesh


class Ties:
    """The weights that stand in several stages, and the ranks that hold them.

    Making it is collective: every rank makes the same groups. It takes the stages of the whole model.
    """

    def __init__(self, stages: Mapping[int, nn.Module], places: Mapping[int, int], mesh: Mesh) -> None:
        self._groups: dict[str, dist.ProcessGroup | None] = {}
        for name, held in _shared(stages).items():
            for number, module, attribute in held[1:]:
                original: nn.Parameter = getattr(module, attribute)
                copy = nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad)
                setattr(module, attribute, copy)
                note(copy, tied=name, copy=True)
                assert number != held[0][0]
            first: nn.Parameter = getattr(held[0][1], held[0][2])
            note(first, tied=name)
            self._groups[name] = mesh.along("pp", sorted({places[number] for number, _, _ in held}))

    def add_up(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Add up the gradients of all copies, in place: (name of the tie, gradient of a copy that is here)."""
        here: dict[str, list[Tensor]] = {}
        for name, gradient in gradients:
            here.setdefault(name, []).append(gradient)
        for name, group in self._groups.items():
            if name not in here:
                continue
            first, *others = here[name]
            for other in others:
                first += other
            if group is not None:
                dist.all_reduce(first, group=group)
            for other in others:
                other.copy_(first)


def _shared(stages: Mapping[int, nn.Module]) -> dict[str, list[tuple[int, nn.Module, str]]]:
    """Parameters that stand in several stages: first name, and (stage, module, attribute) of each place."""
    names: dict[nn.Parameter, str] = {}
    places: dict[nn.Parameter, list[tuple[int, nn.Module, str]]] = {}
    for number in sorted(stages):
        for path, module in stages[number].named_modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                names.setdefault(parameter, f"{path}.{attribute}")
                places.setdefault(parameter, []).append((number, module, attribute))
    return {names[parameter]: held for parameter, held in places.items() if len({number for number, _, _ in held}) > 1}
