"""Tied weights in a pipeline: one weight in two places, and the places lie on different stages.

A GPT may use its token embedding as output layer (Press & Wolf 2017, arXiv:1608.05859). Each of the two stages then
holds a copy; the gradients of the copies are added up, so both make the same update and stay equal (as in Megatron-LM).
In a folded pipeline the two stages may lie on one rank: they still are two copies, and nothing has to travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

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
        shared = _shared(stages)
        copies: dict[tuple[str, int], nn.Parameter] = {}
        """One for each stage beyond the first; a weight may stand in several places of a stage."""
        for name, (original, held) in shared.items():
            note(original, tied=name)
            for number in sorted({number for number, _, _ in held})[1:]:
                copy = copies[name, number] = nn.Parameter(original.detach().clone(), original.requires_grad)
                note(copy, tied=name, copy=True)
            self._groups[name] = mesh.along("pp", sorted({places[number] for number, _, _ in held}))
        _own_modules(stages)
        for name, (_, held) in shared.items():
            for number, path, attribute in held:
                if (name, number) in copies:
                    setattr(stages[number].get_submodule(path), attribute, copies[name, number])

    @property
    def names(self) -> list[str]:
        """First names of these weights."""
        return list(self._groups)

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


def _shared(stages: Mapping[int, nn.Module]) -> dict[str, tuple[nn.Parameter, list[tuple[int, str, str]]]]:
    """Parameters that stand in several stages: first name to parameter and places (stage, module, attribute)."""
    names: dict[nn.Parameter, str] = {}
    places: dict[nn.Parameter, list[tuple[int, str, str]]] = {}
    for number in sorted(stages):
        for path, module in stages[number].named_modules(remove_duplicate=False):
            for attribute, parameter in module.named_parameters(recurse=False):
                names.setdefault(parameter, f"{path}.{attribute}")
                places.setdefault(parameter, []).append((number, path, attribute))
    return {
        names[parameter]: (parameter, held)
        for parameter, held in places.items()
        if len({number for number, _, _ in held}) > 1
    }


def _own_modules(stages: Mapping[int, nn.Module]) -> None:
    """A module with parameters that stands in several stages is copied for all but the first; parameters are not."""
    seen: set[nn.Module] = set()
    for number in sorted(stages):
        done: list[str] = []
        mine = {path: module for path, module in stages[number].named_modules(remove_duplicate=False) if path}
        for path, module in mine.items():
            inside = any(path.startswith(f"{one}.") for one in done)
            if not inside and module in seen and any(True for _ in module.parameters()):
                parent, _, last = path.rpartition(".")
                kept = {id(parameter): parameter for parameter in module.parameters()}
                setattr(stages[number].get_submodule(parent), last, deepcopy(module, kept))
                done.append(path)
        seen |= set(mine.values())
