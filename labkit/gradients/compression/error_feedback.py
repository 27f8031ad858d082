"""Buffers that a method keeps for every parameter between optimizer steps, e.g. what it has not sent yet.

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019): what compression has cut off is added to
the next gradient, so that nothing is lost, only delayed.

Buffers belong to parameters, not to buckets, because buckets may be assigned anew. They stay on their rank, and a
checkpoint stores them rank by rank: a run that is resumed with the same ranks and the same layout restores them.
Otherwise they start from zero, and the run says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.gradients.compression.compressor import GradientBucket


class ErrorFeedback:
    """Per-parameter buffers in the shape of the gradients, initialised to zero."""

    def __init__(self) -> None:
        self._flats: dict[tuple[Any, ...], Tensor] = {}
        self._views: dict[Any, Tensor] = {}
        self._restored: dict[int, Tensor] = {}
        """Buffers from a checkpoint, by the order in which their buckets come, until they come."""

    def of(self, bucket: GradientBucket) -> Tensor:
        """Return the buffer laid out like `bucket.flat`; the caller changes it in place."""
        key = _keys(bucket)
        flat = self._flats.get(key)
        if flat is None:
            index = len(self._flats)
            flat = self._relayout(bucket)
            if index in self._restored:
                flat.copy_(self._restored.pop(index))
            self._flats[key] = flat
        return flat

    def _relayout(self, bucket: GradientBucket) -> Tensor:
        """Return a new buffer for this bucket, with the values of its parameters from older buffers."""
        flat = torch.zeros_like(bucket.flat)
        for parameter, view in zip(bucket.parameters, bucket.views(flat), strict=True):
            previous = self._views.get(parameter)
            if previous is not None:
                view.copy_(previous)
            self._views[parameter] = view
        moved_keys = set(_keys(bucket))
        self._flats = {key: old for key, old in self._flats.items() if moved_keys.isdisjoint(key)}
        return flat

    def state(self) -> dict[str, Tensor]:
        """Return all buffers, numbered in the order in which their buckets first came."""
        flats = dict(enumerate(self._flats.values()))
        return {str(index): flat for index, flat in (self._restored | flats).items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; call it before the first bucket, and buckets must come in the same order."""
        self._restored = {int(index): flat for index, flat in state.items()}


def _keys(bucket: GradientBucket) -> tuple[Any, ...]:
    """Return keys of a bucket's parameters: ids of tensors, which have no equality, or the tuples that name slices."""
    return tuple(parameter if isinstance(parameter, tuple) else id(parameter) for parameter in bucket.parameters)
