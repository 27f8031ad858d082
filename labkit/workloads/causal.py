"""A test of whether a language model sees the tokens that it has to predict, independent of what its library claims.

A token is changed, and the logits at earlier positions must not change. The source of the leak does not matter: an
encoder used as a decoder, attention without a mask, a normalisation over the sequence. (Issue 11, A1: an encoder
reported 0.13 bits per character.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.workloads.restore import undisturbed

MAX_TOKENS = 512
"""Maximum length of the sample in tokens; the test takes three forward passes over it."""
ROUNDING = 1e-5
"""Tolerance as a fraction of the largest logit: the effect of another order of summation, far below that of a leak."""
_NEAR_ZERO = 1e-2
_NOISE = 0.02


def first_leak(model: nn.Module, vocabulary: int, context: int, longest: int = MAX_TOKENS) -> tuple[int, int] | None:
    """Return (position that moved, later position whose token was changed), or None for a causal model.

    `model` takes tokens [N, T] int64 and returns logits whose first two axes are [N, T]. It is tested in eval mode on
    min(context, longest) random tokens. Weights that are (nearly) zero get noise meanwhile, because a layer that starts
    at zero would hide its leak until it is trained. Modes, weights, buffers and random states are restored afterwards.
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
            # NaN proves nothing, but it is not a leak either.
            moved = torch.nonzero(difference > limit)
            if len(moved):
                return int(moved[0]), changed
    return None


def refuse_leak(
    model: nn.Module, vocabulary: int, context: int, name: str, advice: str = "", longest: int = MAX_TOKENS
) -> None:
    """Raise ValueError in one sentence if `model` (called `name`) sees later tokens; `advice` says what to do."""
    leak = first_leak(model, vocabulary, context, longest)
    if leak is not None:
        raise ValueError(
            f"{name} is not a causal model: changing token {leak[1]} moves its scores at position {leak[0]}, so it "
            f"sees the tokens that it has to predict{advice and '; '}{advice}"
        )


@contextmanager
def restored_afterwards(model: nn.Module) -> Iterator[None]:
    """Restore the weights, buffers and modes of the model and torch's random state at the end.

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
    """Return the weights so small that a signal through them cannot be distinguished from rounding."""
    return [
        parameter
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.numel() and float(parameter.detach().abs().max()) < _NEAR_ZERO
    ]


def _add_noise(model: nn.Module) -> None:
    """Add fixed noise to the weights that are nearly zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in _near_zero(model):
        noise = torch.randn(parameter.shape, generator=generator) * _NOISE
        parameter.add_(noise.to(parameter.device, parameter.dtype))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the model's logits in at least float32."""
    logits: Tensor = model(tokens)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
