"""One update looked at closely: memory, traffic, pipeline and experts of this rank. All other updates run untouched."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from labkit.experiment import Experiment
from labkit.experiment.memory import model_state, stash
from labkit.parallel.asynchronous import AsynchronousPipeline
from labkit.parallel.model import ParallelModel
from labkit.parallel.replicate import ReplicatedModel
from labkit.parallel.shard import to_local
from labkit.parallel.traffic import Traffic
from labkit.training.clock import clock
from labkit.training.probes.activations import Activations


class Trace:
    """Around the one traced update, as a context manager; `found()` is what the rank writes down afterwards.

    Where minibatches under way in that update have begun before it, `watch()` comes earlier: from there on activations
    and stashed weights are counted and the timeline is kept.
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
        self._spread = model if isinstance(model, ParallelModel) else None
        pipeline = self._spread.pipeline if self._spread is not None else None
        self._stashes = pipeline if isinstance(pipeline, AsynchronousPipeline) else None
        self._memory: dict[str, int] = {}
        self._timeline: list[Any] = []
        self._open = ExitStack()

    def watch(self) -> None:
        """Count what is kept for backward passes, and keep the timeline, from here on."""
        if self._spread is not None and self._spread.timeline is not None:
            self._spread.timeline.start()
        self._open.enter_context(self._activations)

    def __enter__(self) -> Trace:
        self._experts = dict(_mixtures(self._parts))
        for module in self._experts.values():
            module.load = torch.zeros(module.router.out_features, dtype=torch.int64, device=self._device)
        if self._spread is not None:
            self._traffic = self._open.enter_context(Traffic(self._spread.mesh, clock(self._device)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()
        if self._spread is not None and self._spread.timeline is not None:
            self._timeline = self._spread.timeline.stop()
        self._loads = {name: module.load for name, module in self._experts.items()}
        for module in self._experts.values():
            module.load = None

    def measure(self) -> None:
        """Look at the memory: the optimizer has stepped, the gradients are still there."""
        parameters = [parameter for part in self._parts for parameter in part.parameters()]
        optimized = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        gradients = [one.grad for one in (*parameters, *optimized) if one.grad is not None]
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        self._memory = {
            "parameters": _bytes(parameters),
            "gradients": _bytes(gradients),
            "optimizer": _bytes(value for value in states if isinstance(value, Tensor)),
        }

    def found(self) -> dict[str, Any]:
        """The fields of the event `trace`. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        sizes = [(one.numel() * one.element_size(), one.requires_grad) for p in self._parts for one in p.parameters()]
        held = sum(size for size, _ in sizes)
        trained = sum(size for size, is_trained in sizes if is_trained)
        formula = model_state(self._experiment, held, trained)
        if self._stashes is not None:
            self._memory["stash"] = self._stashes.max_stashed_bytes
            formula["stash"] = stash(self._experiment, self._stashes.ahead, trained)
        found: dict[str, Any] = {
            "memory": self._memory | {"activations": self._activations.peak},
            "formula": formula,
        }
        if self._spread is not None:
            self._spread.traffic = found["traffic"] = self._traffic.axes()
        if self._timeline:
            origin_kept = [
                [kind, stage, number, round(b, 7), round(e, 7)] for kind, stage, number, b, e in self._timeline
            ]
            found["timeline"] = origin_kept
        if self._experts and self._model.mesh.index("tp") == 0:  # ranks along tp route the same tokens
            found["experts"] = {name: load.tolist() for name, load in self._loads.items()}
        return found


def _mixtures(parts: Iterable[nn.Module]) -> Iterable[tuple[str, Any]]:
    """The mixtures of experts of these parts of the model that can tell their load, by the name of their block."""
    for part in parts:
        for name, module in part.named_modules():
            if hasattr(module, "load") and hasattr(module, "experts") and hasattr(module, "router"):
                yield name.removeprefix("blocks.").removesuffix(".mlp"), module


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Memory behind these tensors: each storage once."""
    storages = {}
    for tensor in tensors:
        storage = to_local(tensor.detach()).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
