"""Masks of one rank: applied to what its optimizer works on, measured, saved.

A weight that is masked is zero in the forward pass, gets no gradient and has no moments; so it stays zero, and the same
network is trained by every optimizer and in every layout. All of it still costs what a dense network costs: zeros are
multiplied like other numbers. (csr.py computes with the others only.)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn


class Entries(Protocol):
    """Between whole weights and what the optimizer of a rank works on: labkit.parallel.entries."""

    def whole(self, read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]: ...

    def parts(self, whole: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]: ...

    def held_parts(self, whole: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]: ...

    def held(self) -> Mapping[str, nn.Parameter]: ...

    def patterns(self) -> Mapping[str, tuple[nn.Parameter, Any]]: ...

    def averaged(self, tensor: Tensor) -> Tensor: ...

    def stages_together(self, values: Mapping[str, Tensor]) -> tuple[Tensor, int]: ...

    def named_together(self, values: dict[str, Any]) -> dict[str, Any]: ...

    def agreed(self, said: int) -> int: ...


class Masks:
    """Which weights of this rank's layers are kept."""

    def __init__(self, entries: Entries, optimizer: torch.optim.Optimizer) -> None:
        self._entries, self._optimizer = entries, optimizer
        self.whole: dict[str, Tensor] = {}
        """By name, bool, whole on every rank that holds a part of the weight; empty while all weights are kept."""
        self._parts: list[tuple[nn.Parameter, Tensor]] = []
        self._new: dict[str, int] = {}
        """By name, how many weights have come in the last change."""
        self.compared = 0
        """How often masks were found equal to those of other ranks."""

    def restore(self, masks: dict[str, Tensor]) -> None:
        """Use masks of a checkpoint, which may be those of all stages."""
        devices = {name: weight.device for name, weight in self.weights().items()}
        self.whole = {name: masks[name].to(device) for name, device in devices.items()}
        for name, (_, pattern) in self._entries.patterns().items():
            pattern.set(self.whole[name])
        self._spread()

    def set(self, masks: dict[str, Tensor]) -> dict[str, float]:
        """Use these masks from now on. What comes or goes starts from zero, its moments too.

        Returns what part of the kept weights is new, by name. RuntimeError if other ranks have chosen other masks
        (collective): what they train would not be one network any more, and nothing else would show it.
        """
        self.compared += self._entries.agreed(_fingerprint(masks)) > 1
        come_or_gone, churn, self._new = {}, {}, {}
        for name, mask in masks.items():
            before = self.whole.get(name)
            new = mask & ~before if before is not None else torch.zeros_like(mask)
            # Ones where nothing changes: a weight that stays keeps its value and its moments.
            come_or_gone[name] = (mask & ~new).to(torch.float32)
            self._new[name] = int(new.sum())
            churn[name] = self._new[name] / max(1, int(mask.sum()))
        self._move(masks)
        self.whole = dict(masks)
        self._spread()
        # Weights where passes compute with them: with ZeRO, a rank optimizes a part, which lies in the same memory.
        for parameter, keeps in self._entries.held_parts(come_or_gone):
            _multiply(parameter, keeps)
        for parameter, keeps in self._entries.parts(come_or_gone):
            for value in self._moments(parameter):
                _multiply(value, keeps)
        return churn

    def _move(self, masks: dict[str, Tensor]) -> None:
        """Where values alone are kept, those that stay go to their new places."""
        for name, (parameter, pattern) in self._entries.patterns().items():
            moments = self._moments(parameter)
            dense = [pattern.spread(tensor.detach()) for tensor in (parameter, *moments)]
            pattern.set(masks[name])
            for tensor, whole in zip((parameter, *moments), dense, strict=True):
                tensor.detach().copy_(pattern.taken(whole))

    def _moments(self, parameter: nn.Parameter) -> list[Tensor]:
        values = self._optimizer.state.get(parameter, {}).values()
        return [value for value in values if isinstance(value, Tensor) and value.dim()]

    def _spread(self) -> None:
        self._parts = list(self._entries.parts({n: m.to(torch.float32) for n, m in self.whole.items()}))

    def mask_gradients(self) -> None:
        """Masked weights get no gradient."""
        for parameter, part in self._parts:
            if parameter.grad is not None:
                _multiply(parameter.grad, part)

    def add_to_gradients(self, whole: dict[str, Tensor]) -> None:
        """Add to the gradients that the optimizer sees."""
        for parameter, part in self._entries.parts(whole):
            if parameter.grad is not None:
                _own(parameter.grad).add_(part)

    def held(self) -> Mapping[str, nn.Parameter]:
        """The parameters that the passes of this rank compute with."""
        return self._entries.held()

    def weights(self) -> dict[str, Tensor]:
        """The whole weights (collective)."""
        return self._entries.whole(lambda parameter: parameter.detach())

    def gradients(self) -> dict[str, Tensor]:
        """Their whole gradients (collective), which stay as they are when those of the optimizer are masked."""

        def read(parameter: nn.Parameter) -> Tensor:
            return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()

        return self._entries.whole(read)

    def averaged(self, tensor: Tensor) -> Tensor:
        """The mean over replicas, in place (collective)."""
        return self._entries.averaged(tensor)

    def together(self, values: dict[str, Any]) -> dict[str, Any]:
        """What all stages of a pipeline know, by name (collective along pp)."""
        return self._entries.named_together(values)

    def in_a_row(self, values: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The values of all stages one after the other, and where those of this rank begin (collective along pp)."""
        return self._entries.stages_together(values)

    def zeros(self, changed: bool = False) -> dict[str, tuple[int, int]]:
        """By name, how many weights are zero, counted in what the optimizer works on, and how many there are
        (collective; all stages of a pipeline). Just `changed`: without those that have come and are still zero.
        """
        found = {}
        for name, value in self.weights().items():
            new = self._new.get(name, 0) if changed else 0
            found[name] = int((value == 0).sum()) - new, value.numel()
        return self.together(found)


def _fingerprint(masks: Mapping[str, Tensor]) -> int:
    found = 0
    for name, mask in masks.items():
        found = zlib.crc32(mask.contiguous().cpu().numpy().data, zlib.crc32(name.encode(), found))
    return found


def _multiply(tensor: Any, factor: Tensor) -> None:
    own = _own(tensor)
    own.mul_(factor.to(own.dtype))


def _own(tensor: Any) -> Tensor:
    """What this rank holds of it, outside of autograd."""
    own: Tensor = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()
    return own
