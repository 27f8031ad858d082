"""What a method remembers of every parameter between updates, e.g. what it has not sent yet (error feedback).

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019): what compression has cut off is added to
the next gradient, so that nothing is lost, only late.

Kept by parameter, not by bucket, should buckets ever be dealt out anew. It stays on its rank, and a checkpoint keeps it
rank by rank: a run that goes on with the same ranks and the same layout goes on with it. On others it starts from zero,
and the run says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.gradients.compression.compressor import GradientBucket


class ErrorFeedback:
    """One number for each number of the gradients, zero at first."""

    def __init__(self) -> None:
        self._flats: dict[tuple[Any, ...], Tensor] = {}
        self._views: dict[Any, Tensor] = {}
        self._restored: dict[int, Tensor] = {}
        """What a checkpoint held, by the order in which bundles come, until they come."""

    def of(self, bucket: GradientBucket) -> Tensor:
        """What is remembered, laid out like `bucket.flat`; change it in place."""
        key = _keys(bucket)
        flat = self._flats.get(key)
        if flat is None:
            place = len(self._flats)
            flat = self._gather(bucket)
            if place in self._restored:
                flat.copy_(self._restored.pop(place))
            self._flats[key] = flat
        return flat

    def _gather(self, bucket: GradientBucket) -> Tensor:
        """The same numbers in a new order."""
        flat = torch.zeros_like(bucket.flat)
        for parameter, view in zip(bucket.parameters, bucket.views(flat), strict=True):
            known = self._views.get(parameter)
            if known is not None:
                view.copy_(known)
            self._views[parameter] = view
        moved = set(_keys(bucket))
        self._flats = {key: old for key, old in self._flats.items() if moved.isdisjoint(key)}
        return flat

    def state(self) -> dict[str, Tensor]:
        """All that is remembered, flat by flat in the order in which their bundles first came."""
        flats = dict(enumerate(self._flats.values()))
        return {str(place): flat for place, flat in (self._restored | flats).items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on with what `state` returned, when the same bundles come in the same order; before any has come."""
        self._restored = {int(place): flat for place, flat in state.items()}


def _keys(bucket: GradientBucket) -> tuple[Any, ...]:
    """What a bundle's parameters are known by: themselves, as tensors have no equality; names of stretches by value."""
    return tuple(one if isinstance(one, tuple) else id(one) for one in bucket.parameters)
