"""AdamW and SGD for low precision: steps are computed in float32, whatever the dtypes of weights and moments.

A bfloat16 weight has 8 bits: a change below 1/512 of it is lost when the sum is rounded to nearest, and late in
training nearly all changes are. Stochastic rounding, up or down at random, is unbiased (Gupta et al. 2015,
arXiv:1502.02551; for bfloat16, Zamirai et al. 2020, arXiv:2010.06192).

All random numbers follow from the seed, the step and the index of the parameter in the optimizer: so replicas draw the
same numbers, and a resumed run repeats what the first one did.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from labkit.experiment import Optimizer
from labkit.experiment.random_streams import Stream, stream_seed
from labkit.quantization.codes import to_bfloat16
from labkit.quantization.eight_bit import SMALLEST, pack, unpack
from labkit.quantization.fused import fused

State = dict[str, Any]
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
"""The moments of AdamW, and whether they have a sign."""


class Narrow(torch.optim.Optimizer):
    """Base class of both optimizers; random numbers follow from `seed`."""

    def __init__(self, groups: list[dict[str, Any]], settings: Optimizer, seed: int) -> None:
        super().__init__(groups, {"lr": settings.lr})
        self.settings, self.seed = settings, seed
        self.watched = False
        """Whether to count how bfloat16 weights are rounded, which takes time."""
        self.gradient_types: set[torch.dtype] = set()
        """Dtypes of the gradients seen so far."""
        self.rounded = self.not_to_nearest = 0
        """Number of weights rounded while `watched`, and how many of them not to their nearest neighbour."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._update(parameter, group, index)

    def _update(self, parameter: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        state["step"] += 1
        step = int(state["step"])
        seed = stream_seed(self.seed, Stream.STATE_ROUNDING, step, index)
        noise = torch.Generator(parameter.device).manual_seed(seed)
        weight, gradient = _local(parameter), _local(parameter.grad)
        self.gradient_types.add(gradient.dtype)
        full = weight.float()  # the weight itself if it is float32
        self.change(full, gradient.float(), state, group, step, noise)
        if weight.dtype == torch.bfloat16:
            rounded = to_bfloat16(full, noise)
            if self.watched:
                self.rounded += full.numel()
                self.not_to_nearest += int((rounded != to_bfloat16(full)).sum())
            weight.copy_(rounded)

    @abstractmethod
    def change(
        self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], step: int, noise: torch.Generator
    ) -> None:
        """Apply step number `step` (from 1) to a float32 weight, in place."""

    def unpacked(self, parameter: Tensor) -> State:
        """Return the state of a parameter as torch's optimizers keep it: float32 tensors in its shape and sharding."""
        return {
            name: _like(value, parameter) if value.dim() else value
            for name, value in self.unpack_state(self.state.get(parameter, {}), _local(parameter)).items()
        }

    def unpack_state(self, state: State, like: Tensor) -> State:
        """Return the state of a tensor shaped `like` this one, without packing."""
        return state


class NarrowSGD(Narrow):
    """SGD with momentum: m ← μ·m + g, w ← w - lr · m."""

    def change(
        self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], step: int, noise: torch.Generator
    ) -> None:
        """Apply the same step as torch.optim.SGD."""
        gradient = gradient.add(weight, alpha=group["weight_decay"])
        if self.settings.momentum:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            gradient = _local(state["momentum_buffer"]).mul_(self.settings.momentum).add_(gradient)
        weight.sub_(gradient, alpha=group["lr"])


class NarrowAdamW(Narrow):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); with `state_bits` 8 its moments are packed (eight_bit.py).

    A packed moment is `NAME_codes` and `NAME_scale` in the state. Moments from a checkpoint are not packed until the
    next step, so a resumed run continues from exactly what was saved.
    """

    def change(
        self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], step: int, noise: torch.Generator
    ) -> None:
        """Apply the same step as torch.optim.AdamW."""
        packs = self.settings.state_bits == 8 and weight.numel() >= SMALLEST
        first, second = self.settings.beta1, self.settings.beta2
        moments = self.unpack_state(state, weight)
        m, v = (_local(moments[name]) if name in moments else torch.zeros_like(gradient) for name in SIGNED)
        decay = 1 - group["lr"] * group["weight_decay"]
        root, lr = (1 - second**step) ** 0.5, group["lr"] / (1 - first**step)
        _adamw(weight, gradient, m, v, first, second, decay, root, self.settings.eps, lr)
        for (name, signed), moment in zip(SIGNED.items(), (m, v), strict=True):
            if packs:
                state.pop(name, None)
                state[f"{name}_codes"], state[f"{name}_scale"] = pack(moment, signed, noise)
            else:
                state[name] = moment

    def unpack_state(self, state: State, like: Tensor) -> State:
        """Return the state with moments in float32."""
        unpacked = {name: value for name, value in state.items() if not name.endswith(("_codes", "_scale"))}
        for name, signed in SIGNED.items():
            if f"{name}_codes" in state:
                unpacked[name] = unpack(state[f"{name}_codes"], state[f"{name}_scale"], signed, like)
        return unpacked


@fused
def _adamw(
    weight: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    first: float,
    second: float,
    decay: float,
    root: float,
    eps: float,
    lr: float,
) -> None:
    """Update weight and moments in place: w ← decay·w - lr · m / (√v / root + eps)."""
    m.lerp_(gradient, 1 - first)
    v.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    weight.mul_(decay)
    weight.addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-lr)


def _local(tensor: Any) -> Tensor:
    """Return this rank's shard, detached from autograd."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    return local


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return `value` as a DTensor if the parameter is one."""
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
