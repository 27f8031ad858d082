"""Hogwild: one model in memory that all ranks share, changed by all of them without a lock (Niu et al., NIPS 2011).

Every rank computes a gradient from the weights as it finds them, possibly half changed by others, and steps on them at
once; nothing is sent. The paper's guarantee is for sparse problems; dense networks lose updates where two ranks write
to the same place. Moments of the optimizer are each rank's own, buffers of the model are shared too.

Each of N ranks steps with 1/N of its own learning rate, since N steps stand for one synchronous update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.experiment.problem import Problem
from labkit.gradients.updates.own_steps import LocalStepOptions, local_lr_scale
from labkit.gradients.updates.tickets import AsyncUpdateRule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.gradients.exchange import Counters


class Hogwild(AsyncUpdateRule):
    """One model in shared memory, no locks."""

    class Options(LocalStepOptions):
        pass

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Why it cannot run here."""
        yield from AsyncUpdateRule.problems(experiment, machine)
        if experiment.launch.device == "cuda":
            reason = "hogwild shares a model in the memory of the host; GPUs have one each"
            yield Problem("gradients.update.method", reason, "parameter_server")
        if experiment.launch.network is not None:
            reason = "hogwild sends nothing, so a slower link changes nothing; it is for one machine"
            yield Problem("launch.network", reason, "null")

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, kept: bool) -> str:
        """Who writes first is chance."""
        return "which rank of hogwild changes a weight first is chance, so no two runs are alike"

    def load(self, state: dict[str, Tensor]) -> None:
        """Move the model of this rank into the shared memory; rank 0's values count (collective)."""
        import torch

        from labkit.gradients.updates.average import weights_and_buffers

        path, parts = self.context.folder / "hogwild", weights_and_buffers(self.model)
        size = sum(_room(part) for part in parts) + _aligned(8 * self.comm.size)
        token = torch.zeros(1)
        if self.comm.rank == 0:
            path.write_bytes(b"")
            path.chmod(0o600)
        self.comm.all_reduce(token).wait()
        memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        self.comm.all_reduce(token).wait()
        if self.comm.rank == 0:
            path.unlink()
        self._counts = memory[: 8 * self.comm.size].view(torch.int64)
        """Updates made by each rank; each writes its own number only."""
        begin = _aligned(8 * self.comm.size)
        places = {}
        for part in parts:
            end = begin + part.numel() * part.element_size()
            places[part.data_ptr()] = memory[begin:end].view(part.dtype).view(part.shape)
            if self.comm.rank == 0:
                places[part.data_ptr()].copy_(part)
            begin += _room(part)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = places.get(tensor.data_ptr(), tensor.data)
        self.comm.all_reduce(token).wait()

    def fetch_weights(self) -> None:
        """The weights are in place; remember how often they have been changed."""
        self._seen = int(self._counts.sum())

    def apply_gradient(self, work_item: int) -> int | None:
        """Step on the shared weights."""
        stale = int(self._counts.sum()) - self._seen
        for group in self.optimizer.param_groups:
            group["lr"] *= local_lr_scale(self.options, self.context.experiment) / self.comm.size
        self.optimizer.step()
        self._counts[self.comm.rank] += 1
        return stale

    def counters(self) -> Counters | None:
        """Nothing is sent."""
        return None

    def close(self) -> None:
        """Wait for all ranks: nobody changes the weights until the next stretch."""
        import torch

        self.comm.all_reduce(torch.zeros(1)).wait()


def _aligned(size: int) -> int:
    """So many bytes or a few more, so that numbers of any kind may follow (complex ones of float64 take 16)."""
    return -(-size // 16) * 16


def _room(part: Tensor) -> int:
    """Bytes of a tensor in the shared memory."""
    return _aligned(part.numel() * part.element_size())
