"""1-bit Adam (Tang et al., ICML 2021): AdamW whose momentum is averaged with one bit a number.

Signs do not suit Adam: it divides by the root of the mean squares of what it is given, and those of signs are all
alike. But the mean squares soon stop changing. So it is plain AdamW with whole gradients for `warmup_steps`; then the
mean squares v are frozen, and what ranks average is the momentum, each with its own gradient in it:

    m ← mean( β·m + (1-β)·g ),   then   w ← w - rate · m / (√v + ε)

averaged as signs with a scale, with error feedback, in two rounds: rank j gets the j-th part of everyone (all-to-all),
averages, and sends signs of the mean to all (all-gather), with error feedback on both sides. So the bytes do not grow
with the number of ranks as those of gathered signs do.

Here signs are taken of m / (√v + ε), which is linear in m, so that the scale is that of the update, and a weight whose
gradients are small is not pushed about by the scale of the others. What was hardly touched in the warm-up has hardly
a denominator: those far below the root mean square of their parameter's are raised (`frozen_adamw.FLOOR`).

What `optimizer.clip_norm` limits after the warm-up is the norm of the averaged momentum.

Bytes that one of N ranks sends for n numbers after the warm-up: 2·(N-1) · (n/8N + 4), n/N rounded up to a multiple of
8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options as BaseOptions
from labkit.gradients.compressor import Bundle, Moment, Shape, UnderWay, beginning, numel
from labkit.gradients.cost import all_gather_bytes, all_to_all_bytes
from labkit.gradients.late import LateCompressor

if TYPE_CHECKING:
    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine


class OneBitAdam(LateCompressor):
    """1-bit Adam."""

    name = "onebit_adam"
    momentum = True

    class Options(BaseOptions):
        """When it begins."""

        warmup_steps: int | None = Field(default=None, ge=1)
        """Updates of plain AdamW before the mean squares are frozen; empty for a tenth of the training."""

        @property
        def freeze(self) -> bool:
            """That is what it is."""
            return True

    def __init__(self, *arguments: Any) -> None:
        from labkit.gradients.memory import Memory

        super().__init__(*arguments)
        self._own_errors, self._sum_errors = Memory(), Memory()

    def compress(self, bundle: Bundle) -> UnderWay:
        """The mean momentum, as everything here in units of √v."""
        import torch

        from labkit.gradients.packing import pack_signs, read_signs

        flat, ranks, count = bundle.flat, self.wire.size, bundle.flat.numel()
        error, part = self._own_errors.of(bundle), _part(count, ranks)
        parts = flat.new_zeros(ranks, part)
        parts.view(-1)[:count] = flat.add_(error)
        message = pack_signs(parts)
        dealt = self.wire.all_to_all(message)
        torch.sub(flat, read_signs(message, part, flat.dtype).view(-1)[:count], out=error)
        yield
        mean = read_signs(dealt.wait(), part, flat.dtype).mean(0)
        error = self._sum_errors.of(_place(bundle, mean))
        message = pack_signs(mean.add_(error)[None])
        gathered = self.wire.all_gather(message[0])
        torch.sub(mean, read_signs(message, part, flat.dtype)[0], out=error)
        yield
        return read_signs(gathered.wait(), part, flat.dtype).view(-1)[:count]

    @classmethod
    def compressed_bytes(cls, options: Any, shapes: Sequence[Shape], moment: Moment) -> int:
        """2·(N-1) · (n/8N + 4)."""
        message = 4 + _part(numel(shapes), moment.ranks) // 8
        return all_to_all_bytes(message * moment.ranks, moment.ranks) + all_gather_bytes(message, moment.ranks)

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """It is a way of doing AdamW."""
        yield from super().problems(experiment, machine)
        field = "gradients.compression.method"
        if experiment.optimizer.name != "adamw":
            yield Problem("optimizer.name", "1-bit Adam averages the momentum of AdamW", "adamw")
        if experiment.gradients.hierarchical:
            yield Problem(field, "between hosts a rank has a stretch of all gradients, without their momentum", "none")
        if experiment.layout.pp > 1:
            reason = "stages add up the gradients of weights that they share, and momenta do not add up"
            yield Problem(field, reason, "none")

    @classmethod
    def begins(cls, options: Any, steps: int) -> int:
        """The first update with compression."""
        return beginning(options.warmup_steps, steps, 0.1)


def _part(count: int, ranks: int) -> int:
    """Numbers that each rank averages: an even share, in whole bytes of signs."""
    return -(-count // (8 * ranks)) * 8


def _place(bundle: Bundle, mean: Tensor) -> Bundle:
    """The part that this rank averages, which is its own whatever the borders of parameters."""
    key = tuple(map(id, bundle.parameters))
    return Bundle(mean, (key,), (tuple(mean.shape),), bundle.step, bundle.number)
