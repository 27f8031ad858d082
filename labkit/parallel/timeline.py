"""When each stage of a pipeline computes what: a `PipelineStage` that records a timeline on request.

Kinds: F forward, B whole backward, I backward to the inputs only, W backward to the weights only (the two halves into
which zero-bubble schedules split B: Qi et al. 2023, arXiv:2401.10241). Times are seconds of CLOCK_MONOTONIC, the same
clock for all processes of a machine. On a GPU a traced step is computed chunk by chunk: the rank waits for the
computing stream before and after each. It does not wait for the whole device: receives that were posted ahead end only
when another stage has passed its own wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

Action = tuple[str, int, int, float, float]
"""Kind, stage, micro-batch, begin and end (s)."""


class Timeline:
    """The actions of one rank. `actions` is None while nothing is recorded."""

    def __init__(self, device: torch.device, microbatches: int) -> None:
        self.actions: list[Action] | None = None
        self._cuda, self._microbatches, self._passes = device.type == "cuda", microbatches, 0

    def start(self) -> None:
        """Start recording, unless it has started already."""
        if self.actions is None:
            self.actions, self._passes = [], 0

    def stop(self) -> list[Action]:
        """Stop recording and return the actions in the order in which they were computed."""
        actions, self.actions = self.actions or [], None
        return actions

    def end_pass(self) -> None:
        """Mark the end of a pass; the micro-batches of the next pass are numbered after those of this one."""
        self._passes += 1

    def now(self) -> float:
        """Return the time (s), on a GPU once the current stream has finished its work."""
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        return time.monotonic()

    def record(self, kind: str, stage: int, microbatch: int, begin: float) -> None:
        """Record an action that began at `begin` and ends now."""
        if self.actions is not None:
            number = self._passes * self._microbatches + microbatch
            self.actions.append((kind, stage, number, begin, self.now()))

    def timed(self, kind: str, stage: int, microbatch: int, compute: Callable[[], Any]) -> Any:
        """Call `compute`, record it as an action, and return its result."""
        if self.actions is None:
            return compute()
        begin = self.now()
        result = compute()
        self.record(kind, stage, microbatch, begin)
        return result

    def with_loss(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap `loss` so that its time counts as part of the last stage's forward pass, which it follows."""

        def timed_loss(*inputs: Any, **kwargs: Any) -> Tensor:
            out = loss(*inputs, **kwargs)
            if self.actions:
                *action, _ = self.actions[-1]
                self.actions[-1] = (*action, self.now())  # type: ignore[assignment]
            return out

        return timed_loss


class TimedStage(PipelineStage):
    """A pipeline stage that records what it computes in `timeline`."""

    def __init__(self, *args: Any, timeline: Timeline, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeline = timeline

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Return the first messages to neighbours, without those that a stage of a V would send to its own rank.

        gloo refuses these, and torch 2.11 makes them nevertheless.
        """
        own = dist.get_rank()
        return [operation for operation in super()._get_init_p2p_neighbors_ops() if operation.peer != own]

    def _timed(self, kind: str, microbatch: int, compute: Callable[[], Any]) -> Any:
        return self._timeline.timed(kind, self.stage_index, microbatch, compute)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        run = super().forward_one_chunk
        self.submod.has_batch = True  # type: ignore[assignment]  # labkit.parallel.pipeline
        try:
            return self._timed("F", fwd_chunk_id, lambda: run(fwd_chunk_id, *args, **kwargs))
        finally:
            self.submod.has_batch = False  # type: ignore[assignment]

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        run = super().backward_one_chunk
        return self._timed(
            "B" if full_backward else "I", bwd_chunk_id, lambda: run(bwd_chunk_id, loss, full_backward, last_backward)
        )

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> Any:
        run = super().backward_weight_one_chunk
        return self._timed("W", bwd_chunk_id, lambda: run(bwd_chunk_id, last_backward))
