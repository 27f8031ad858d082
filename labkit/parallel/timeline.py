"""When each stage of a pipeline computes what: a `PipelineStage` that keeps a timeline while it is asked to.

Kinds: F forward, B whole backward, I backward to the inputs alone, W backward to the weights alone (the two halves into
which zero-bubble schedules split B: Qi et al. 2023, arXiv:2401.10241). Moments are seconds of CLOCK_MONOTONIC, the same
clock for all processes of a machine. On a GPU a traced step is computed chunk by chunk: the rank waits for the stream
that computes before and after each. It does not wait for the whole device: receives that were posted ahead end only
when another stage has come past its own wait.
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
"""Kind, stage, microbatch, begin, end."""


class Timeline:
    """The actions of one rank. `actions` is None while nothing is kept."""

    def __init__(self, device: torch.device, microbatches: int) -> None:
        self.actions: list[Action] | None = None
        self._cuda, self._microbatches, self._passes = device.type == "cuda", microbatches, 0

    def start(self) -> None:
        """Keep what is computed from now on, if that is not so already."""
        if self.actions is None:
            self.actions, self._passes = [], 0

    def stop(self) -> list[Action]:
        """What has been kept, in the order in which it was computed."""
        found, self.actions = self.actions or [], None
        return found

    def end_pass(self) -> None:
        """One pass is over: microbatches of the next one are counted on."""
        self._passes += 1

    def now(self) -> float:
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        return time.monotonic()

    def keep(self, kind: str, stage: int, microbatch: int, begin: float) -> None:
        """An action ends now."""
        if self.actions is not None:
            number = self._passes * self._microbatches + microbatch
            self.actions.append((kind, stage, number, begin, self.now()))

    def timed(self, kind: str, stage: int, microbatch: int, compute: Callable[[], Any]) -> Any:
        """Compute, and keep when that was."""
        if self.actions is None:
            return compute()
        begin = self.now()
        result = compute()
        self.keep(kind, stage, microbatch, begin)
        return result

    def with_loss(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The loss follows the last stage's forward pass and counts as a part of it."""

        def computed(*inputs: Any, **named: Any) -> Tensor:
            out = loss(*inputs, **named)
            if self.actions:
                *action, _ = self.actions[-1]
                self.actions[-1] = (*action, self.now())  # type: ignore[assignment]
            return out

        return computed


class TimedStage(PipelineStage):
    """A stage that tells its timeline what it computes."""

    def __init__(self, *given: Any, timeline: Timeline, **named: Any) -> None:
        super().__init__(*given, **named)
        self._timeline = timeline

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """The first messages to neighbours, without those that a stage of a V would send to its own rank.

        gloo refuses them, and torch 2.11 makes them all the same.
        """
        own = dist.get_rank()
        return [operation for operation in super()._get_init_p2p_neighbors_ops() if operation.peer != own]

    def _timed(self, kind: str, microbatch: int, compute: Callable[[], Any]) -> Any:
        return self._timeline.timed(kind, self.stage_index, microbatch, compute)

    def forward_one_chunk(self, fwd_chunk_id: int, *given: Any, **named: Any) -> Any:
        run = super().forward_one_chunk
        self.submod.computes = True  # type: ignore[assignment]  # labkit.parallel.pipeline
        try:
            return self._timed("F", fwd_chunk_id, lambda: run(fwd_chunk_id, *given, **named))
        finally:
            self.submod.computes = False  # type: ignore[assignment]

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
