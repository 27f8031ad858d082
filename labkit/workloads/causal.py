"""Does a language model see the tokens that it has to predict? Found out by trying, whatever its library says.

A token is changed, and the scores of the positions before it must stay what they were. The source of the leak does not
matter: an encoder taken for a decoder, an attention that was given no mask, a normalisation over the sequence.
(Issue 11, A1: an encoder reported 0.13 bits per character.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.workloads.restore import undisturbed

LONGEST = 512
"""Tokens of the sample at most; the proof costs three forward passes over it."""
ROUNDING = 1e-5
"""Of the largest score: what a change of the order of sums moves, and a leak far exceeds."""
_NEAR_ZERO = 1e-2
_NOISE = 0.02


def first_leak(model: nn.Module, vocabulary: int, context: int, longest: int = LONGEST) -> tuple[int, int] | None:
    """(position that moved, later position whose token was changed), or None for a causal model.

    `model` takes tokens [N, T] int64 and gives scores whose first two axes are [N, T]. It is tried in eval mode on a
    sample of min(context, longest) random tokens. Weights that are (nearly) zero get noise meanwhile: a layer that
    starts at zero would hide its leak until it is trained. Modes, weights, buffers and random numbers are as before
    afterwards.
    """
    length = min(context, longest)
    if length < 2:
        return None
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, length), generator=generator)
    with restored_afterwards(model), torch.no_grad():
        _add_noise(model)
        model.eval()
        logits = _logits(model, tokens.to(device))
        limit = ROUNDING * float(logits.abs().max())
        for changed in sorted({length - 1, length // 2}, reverse=True):
            perturbed = tokens.clone()
            perturbed[0, changed:] = (
                perturbed[0, changed:] + 1 + torch.arange(length - changed) % max(1, vocabulary - 1)
            ) % (vocabulary)
            difference = (_logits(model, perturbed.to(device)) - logits)[:, :changed].abs().flatten(2).amax((0, 2))
            # What is no number cannot prove anything, but it is no leak either.
            moved = torch.nonzero(difference > limit)
            if len(moved):
                return int(moved[0]), changed
    return None


def refuse_leak(
    model: nn.Module, vocabulary: int, context: int, name: str, advice: str = "", longest: int = LONGEST
) -> None:
    """Raise ValueError in one sentence where `model` (called `name`) sees later tokens; `advice` says what to do."""
    leak = first_leak(model, vocabulary, context, longest)
    if leak is not None:
        raise ValueError(
            f"{name} is no causal model: changing token {leak[1]} moves its scores at position {leak[0]}, so it sees "
            f"the tokens that it has to predict{advice and '; '}{advice}"
        )


@contextmanager
def restored_afterwards(model: nn.Module) -> Iterator[None]:
    """Whatever happens to the model inside: its weights, buffers and modes and torch's random numbers are restored.

    Only weights that `_add_noise` may change are copied.
    """
    near_zero = [(tensor, tensor.detach().clone()) for tensor in _near_zero(model)]
    with undisturbed(model, weights=False):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in near_zero:
                    tensor.copy_(before)


def _near_zero(model: nn.Module) -> list[Tensor]:
    """Weights so small that what flows through them cannot be told from rounding."""
    return [
        parameter
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.numel() and float(parameter.detach().abs().max()) < _NEAR_ZERO
    ]


def _add_noise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in _near_zero(model):
        noise = torch.randn(parameter.shape, generator=generator) * _NOISE
        parameter.add_(noise.to(parameter.device, parameter.dtype))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
