"""Tied weights in a pipeline: one weight used in two places that belong to different stages.

A GPT may use its token embedding as output layer (Press & Wolf 2017, arXiv:1608.05859). Each of the two stages then
holds a copy; the gradients of the copies are added up, so both make the same update and stay equal (as in Megatron-LM).
In a folded pipeline one rank may hold both stages: there are still two copies, but nothing has to be sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch.distributed as dist
from torch import Tensor, nn

from labkit.parallel.cut import annotate
from labkit.parallel.mesh import Mesh


class Ties:
    """The weights that several stages share, and the process groups of the ranks that hold them.

    The constructor takes the stages of the whole model and is collective: every rank makes the same groups.
    """

    def __init__(self, stages: Mapping[int, nn.Module], pp_rank_of: Mapping[int, int], mesh: Mesh) -> None:
        self._groups: dict[str, dist.ProcessGroup | None] = {}
        shared = _shared(stages)
        copies: dict[tuple[str, int], nn.Parameter] = {}
        """One copy for each stage beyond the first; a stage may use the weight in several places."""
        for name, (original, uses) in shared.items():
            annotate(original, tied=name)
            for number in sorted({number for number, _, _ in uses})[1:]:
                copy = copies[name, number] = nn.Parameter(original.detach().clone(), original.requires_grad)
                annotate(copy, tied=name, copy=True)
            self._groups[name] = mesh.new_group_along("pp", sorted({pp_rank_of[number] for number, _, _ in uses}))
        _copy_shared_modules(stages)
        for name, (_, uses) in shared.items():
            for number, path, attribute in uses:
                if (name, number) in copies:
                    setattr(stages[number].get_submodule(path), attribute, copies[name, number])

    @property
    def names(self) -> list[str]:
        """Names of the tied weights, each by the first place that uses it."""
        return list(self._groups)

    def all_reduce_gradients(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the gradients of all copies of each tied weight by their sum, in place (collective).

        `gradients` yields (name of the tied weight, gradient of a copy that this rank holds).
        """
        local: dict[str, list[Tensor]] = {}
        for name, gradient in gradients:
            local.setdefault(name, []).append(gradient)
        for name, group in self._groups.items():
            if name not in local:
                continue
            total, *rest = local[name]
            for gradient in rest:
                total += gradient
            if group is not None:
                dist.all_reduce(total, group=group)
            for gradient in rest:
                gradient.copy_(total)


def _shared(stages: Mapping[int, nn.Module]) -> dict[str, tuple[nn.Parameter, list[tuple[int, str, str]]]]:
    """Find parameters used by several stages: first name to (parameter, uses as (stage, module, attribute))."""
    names: dict[nn.Parameter, str] = {}
    uses: dict[nn.Parameter, list[tuple[int, str, str]]] = {}
    for number in sorted(stages):
        for path, module in stages[number].named_modules(remove_duplicate=False):
            for attribute, parameter in module.named_parameters(recurse=False):
                names.setdefault(parameter, f"{path}.{attribute}")
                uses.setdefault(parameter, []).append((number, path, attribute))
    return {
        names[parameter]: (parameter, places)
        for parameter, places in uses.items()
        if len({number for number, _, _ in places}) > 1
    }


def _copy_shared_modules(stages: Mapping[int, nn.Module]) -> None:
    """Copy a module with parameters that several stages share for all stages but the first; share its parameters."""
    seen: set[nn.Module] = set()
    for number in sorted(stages):
        copied: list[str] = []
        modules = {path: module for path, module in stages[number].named_modules(remove_duplicate=False) if path}
        for path, module in modules.items():
            inside = any(path.startswith(f"{outer}.") for outer in copied)
            if not inside and module in seen and any(True for _ in module.parameters()):
                parent, _, attribute = path.rpartition(".")
                kept = {id(parameter): parameter for parameter in module.parameters()}
                setattr(stages[number].get_submodule(parent), attribute, deepcopy(module, kept))
                copied.append(path)
        seen |= set(modules.values())
