"""Trace of a single step: memory, traffic, pipeline and experts of this rank. All other steps run without probes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.experiment.memory import model_state_bytes, stash_bytes
from labkit.parallel.asynchronous import AsynchronousPipeline
from labkit.parallel.model import ParallelModel
from labkit.parallel.replicate import ReplicatedModel
from labkit.parallel.shard import to_local
from labkit.parallel.traffic import Traffic
from labkit.training.clock import clock, finish
from labkit.training.probes.activations import Activations


class Trace:
    """Context manager around the traced step; `event_fields()` returns the results afterwards.

    If micro-batches in flight in that step begin before it, call `start()` earlier: from then on activations and
    stashed weights are counted and the timeline is recorded.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: ReplicatedModel | ParallelModel,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        self._experiment, self._model, self._optimizer, self._device = experiment, model, optimizer, device
        self._parts = list(model.stages.values())
        self._activations = Activations(self._parts)
        self._sharded_model = model if isinstance(model, ParallelModel) else None
        pipeline = self._sharded_model.pipeline if self._sharded_model is not None else None
        self._stashes = pipeline if isinstance(pipeline, AsynchronousPipeline) else None
        self._memory: dict[str, int] = {}
        self._timeline: list[Any] = []
        self._stack = ExitStack()

    def start(self) -> None:
        """Start to count activations and to record the timeline."""
        if self._sharded_model is not None and self._sharded_model.timeline is not None:
            self._sharded_model.timeline.start()
        self._stack.enter_context(self._activations)

    def __enter__(self) -> Trace:
        self._experts = dict(_mixtures(self._parts))
        for module in self._experts.values():
            module.load = torch.zeros(module.router.out_features, dtype=torch.int64, device=self._device)
        if self._sharded_model is not None:
            self._traffic = self._stack.enter_context(Traffic(self._sharded_model.mesh, clock(self._device)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()
        if self._sharded_model is not None and self._sharded_model.timeline is not None:
            self._timeline = self._sharded_model.timeline.stop()
        self._loads = {name: module.load for name, module in self._experts.items()}
        for module in self._experts.values():
            module.load = None

    def measure(self) -> None:
        """Measure the memory; call it after the optimizer step, while gradients still exist."""
        parameters = [parameter for part in self._parts for parameter in part.parameters()]
        optimized = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in (*parameters, *optimized) if parameter.grad is not None]
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        self._memory = {
            "parameters": _bytes(parameters),
            "gradients": _bytes(gradients),
            "optimizer": _bytes(value for value in states if isinstance(value, Tensor)),
        }

    def event_fields(self) -> dict[str, Any]:
        """Return the fields of the event `trace`; waits for the device."""
        finish(self._device)
        sizes = [
            (parameter.numel() * parameter.element_size(), parameter.requires_grad)
            for part in self._parts
            for parameter in part.parameters()
        ]
        stored = sum(size for size, _ in sizes)
        trained = sum(size for size, is_trained in sizes if is_trained)
        formula = model_state_bytes(self._experiment, stored, trained)
        if self._stashes is not None:
            self._memory["stash"] = self._stashes.max_stashed_bytes
            formula["stash"] = stash_bytes(self._experiment, self._stashes.ahead, trained)
        fields: dict[str, Any] = {
            "memory": self._memory | {"activations": self._activations.peak},
            "formula": formula,
        }
        if self._sharded_model is not None:
            self._sharded_model.traffic = fields["traffic"] = self._traffic.axes()
        if self._timeline:
            rounded = [[kind, stage, number, round(b, 7), round(e, 7)] for kind, stage, number, b, e in self._timeline]
            fields["timeline"] = rounded
        if self._experts and self._model.mesh.index("tp") == 0:  # ranks along tp route the same tokens
            fields["experts"] = {name: load.tolist() for name, load in self._loads.items()}
        return fields


def _mixtures(parts: Iterable[nn.Module]) -> Iterable[tuple[str, Any]]:
    """Yield the mixture-of-experts modules that can count their load, with the name of their block."""
    for part in parts:
        for name, module in part.named_modules():
            if hasattr(module, "load") and hasattr(module, "experts") and hasattr(module, "router"):
                yield name.removeprefix("blocks.").removesuffix(".mlp"), module


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of memory behind these tensors; each storage counts once."""
    storages = {}
    for tensor in tensors:
        storage = to_local(tensor.detach()).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
