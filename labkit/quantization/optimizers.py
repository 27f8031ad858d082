"""AdamW and SGD for narrow numbers: the update is made in float32, whatever weights, gradients and moments are kept in.

A bfloat16 weight has 8 bits: an update below 1/512 of it is lost when the sum is rounded to the nearest, and late in
training nearly all are. Rounded stochastically, up or down at random, the mean of the weight is right (Gupta et al.
2015, arXiv:1502.02551; of bfloat16, Zamirai et al. 2020, arXiv:2010.06192).

Everything random follows from the seed, the number of the update and the place of the parameter in the optimizer: so
replicas draw alike, and a resumed run repeats what the first one did.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from labkit.experiment import Optimizer
from labkit.quantization.codes import to_bfloat16
from labkit.quantization.eight_bit import SMALLEST, pack, unpack
from labkit.quantization.fused import fused

State = dict[str, Any]
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments of AdamW, and whether they have a sign."""


class Narrow(torch.optim.Optimizer):
    """What both have in common. `seed`: what random numbers follow from."""

    def __init__(self, groups: list[dict[str, Any]], settings: Optimizer, seed: int) -> None:
        super().__init__(groups, {"lr": settings.lr})
        self.settings, self.seed = settings, seed
        self.watched = False
        """Count how bfloat16 weights are rounded, which costs time."""
        self.gradient_types: set[torch.dtype] = set()
        """Of the gradients that it was given."""
        self.rounded = self.against_nearest = 0
        """While it was watched: weights rounded, and how many of them not to their nearest neighbour."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        step = int(state["step"])
        noise = torch.Generator(parameter.device).manual_seed(((self.seed * 1_000_003 + step) * 4099 + place) % 2**63)
        weight, gradient = _local(parameter), _local(parameter.grad)
        self.gradient_types.add(gradient.dtype)
        whole = weight.float()  # the weight itself where it is float32
        self.change(whole, gradient.float(), state, group, step, noise)
        if weight.dtype == torch.bfloat16:
            chosen = to_bfloat16(whole, noise)
            if self.watched:
                self.rounded += whole.numel()
                self.against_nearest += int((chosen != to_bfloat16(whole)).sum())
            weight.copy_(chosen)

    @abstractmethod
    def change(
        self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], step: int, noise: torch.Generator
    ) -> None:
        """The update number `step` (from 1) of a float32 weight, in place."""

    def unpacked(self, parameter: Tensor) -> State:
        """The state of a parameter as other optimizers keep it: float32 tensors of its shape (sharded as it is)."""
        return {
            name: _like(value, parameter) if value.dim() else value
            for name, value in self.plain(self.state.get(parameter, {}), _local(parameter)).items()
        }

    def plain(self, state: State, like: Tensor) -> State:
        """The state of a tensor shaped `like` this one, without packing."""
        return state


class NarrowSGD(Narrow):
    """SGD with momentum: m ← μ·m + g, w ← w - rate · m."""

    def change(
        self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], step: int, noise: torch.Generator
    ) -> None:
        """As torch.optim.SGD."""
        gradient = gradient.add(weight, alpha=group["weight_decay"])
        if self.settings.momentum:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            gradient = _local(state["momentum_buffer"]).mul_(self.settings.momentum).add_(gradient)
        weight.sub_(gradient, alpha=group["lr"])


class NarrowAdamW(Narrow):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); with `state_bits` 8 its moments are packed (eight_bit.py).

    Packed, a moment is `NAME_codes` and `NAME_scale` in the state. What a checkpoint brings is not packed, and stays so
    until the next update: so a resumed run goes on from exactly what was saved.
    """

    def change(
        self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], step: int, noise: torch.Generator
    ) -> None:
        """As torch.optim.AdamW."""
        packs = self.settings.state_bits == 8 and weight.numel() >= SMALLEST
        first, second = self.settings.momentum, 0.999
        known = self.plain(state, weight)
        m, v = (_local(known[name]) if name in known else torch.zeros_like(gradient) for name in SIGNED)
        kept = 1 - group["lr"] * group["weight_decay"]
        root, rate = (1 - second**step) ** 0.5, group["lr"] / (1 - first**step)
        _adamw(weight, gradient, m, v, first, second, kept, root, self.settings.eps, rate)
        for (name, signed), moment in zip(SIGNED.items(), (m, v), strict=True):
            if packs:
                state.pop(name, None)
                state[f"{name}_codes"], state[f"{name}_scale"] = pack(moment, signed, noise)
            else:
                state[name] = moment

    def plain(self, state: State, like: Tensor) -> State:
        """With the moments in float32."""
        found = {name: value for name, value in state.items() if not name.endswith(("_codes", "_scale"))}
        for name, signed in SIGNED.items():
            if f"{name}_codes" in state:
                found[name] = unpack(state[f"{name}_codes"], state[f"{name}_scale"], signed, like)
        return found


@fused
def _adamw(
    weight: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    first: float,
    second: float,
    kept: float,
    root: float,
    eps: float,
    rate: float,
) -> None:
    """Update weight and moments in place: w ← kept·w - rate · m / (√v / root + eps)."""
    m.lerp_(gradient, 1 - first)
    v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    weight.mul_(kept)
    weight.addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-rate)


def _local(tensor: Any) -> Tensor:
    """The part of this rank."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return found


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Sharded as the parameter is."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
