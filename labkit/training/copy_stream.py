"""A stream of its own for batches on their way to a GPU: the copy runs while the GPU still computes the step before.

The host is a step or more ahead of the GPU, because nothing in a step waits for a result. On the stream of the
computation a copy would begin only after everything that was queued before it; here it begins at once, and only the
first operation that reads the batch waits for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from labkit.workloads.base import Batch


class CopyStream:
    """Moves batches to a GPU. They must be in pinned memory, or the host waits for each copy."""

    def __init__(self, device: torch.device, place: Callable[[Batch], Batch]) -> None:
        self._device, self._place = device, place
        self._stream = torch.cuda.Stream(device)

    def place(self, batch: Batch) -> Batch:
        """Return the batch on the GPU, ready for the current stream."""
        with torch.cuda.stream(self._stream):
            placed = self._place(batch)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in placed.values():
            tensor.record_stream(current)  # its memory is not reused before the computation is done with it
        return placed
