"""What a method remembers of every parameter between updates, e.g. what it has not sent yet (error feedback).

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019): what compression has cut off is added to
the next gradient, so that nothing is lost, only late.

Kept by parameter, not by bucket: DDP deals its parameters out anew after the first update. It stays on its rank and is
in no checkpoint (each rank has its own, and a checkpoint belongs to no number of ranks), so it starts from zero after a
resume.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.gradients.compressor import Bundle


class Memory:
    """One number for each number of the gradients, zero at first."""

    def __init__(self) -> None:
        self._flats: dict[tuple[int, ...], Tensor] = {}
        self._views: dict[Any, Tensor] = {}

    def of(self, bundle: Bundle) -> Tensor:
        """What is remembered, laid out like `bundle.flat`; change it in place."""
        key = tuple(map(id, bundle.parameters))
        flat = self._flats.get(key)
        if flat is None:
            flat = self._gather(bundle)
            self._flats[key] = flat
        return flat

    def _gather(self, bundle: Bundle) -> Tensor:
        """The same numbers in a new order."""
        flat = torch.zeros_like(bundle.flat)
        for parameter, view in zip(bundle.parameters, bundle.views(flat), strict=True):
            known = self._views.get(parameter)
            if known is not None:
                view.copy_(known)
            self._views[parameter] = view
        moved = set(map(id, bundle.parameters))
        self._flats = {key: old for key, old in self._flats.items() if moved.isdisjoint(key)}
        return flat
