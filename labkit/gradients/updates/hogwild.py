"""Hogwild: one model in memory that all ranks share, changed by all of them without a lock (Niu et al., NIPS 2011).

Every rank computes a gradient from the weights as it reads them, possibly while others change them, and steps at once;
nothing is sent. The paper's guarantee is for sparse problems; dense networks lose updates where two ranks write to the
same address. Each rank has its own optimizer moments; buffers of the model are shared like the weights.

Each of N ranks steps with 1/N of the learning rate, since N steps make up one synchronous step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from labkit.experiment.problem import Problem
from labkit.gradients.updates.own_steps import LocalStepOptions, local_lr_scale
from labkit.gradients.updates.tickets import AsyncUpdateRule
from labkit.gradients.updates.update import recomputes_nothing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from labkit.experiment import Experiment
    from labkit.experiment.machine import Machine
    from labkit.gradients.exchange import Counters


class Hogwild(AsyncUpdateRule):
    """Lets all ranks train one model in shared memory without locks."""

    class Options(LocalStepOptions):
        pass

    @staticmethod
    def problems(experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield the reasons why it cannot run here."""
        yield from AsyncUpdateRule.problems(experiment, machine)
        yield from recomputes_nothing(experiment)
        if experiment.launch.device == "cuda":
            reason = "hogwild shares a model in the memory of the host, but every GPU has its own memory"
            yield Problem("gradients.update.method", reason, "parameter_server")
        if experiment.launch.network is not None:
            reason = "hogwild sends nothing, so a slower link changes nothing; it is for one machine"
            yield Problem("launch.network", reason, "null")

    @classmethod
    def inexact_resume(cls, options: Any, unscheduled: bool, restores_local_state: bool) -> str:
        """Return why the resume is not exact: the order of writes depends on timing."""
        return "which rank of hogwild changes a weight first depends on timing, so no two runs are alike"

    def load(self, state: dict[str, Tensor]) -> None:
        """Move the model of this rank into shared memory, with the values of rank 0 (collective)."""
        import torch

        from labkit.gradients.updates.average import weights_and_buffers

        path, tensors = self.context.folder / "hogwild", weights_and_buffers(self.model)
        size = sum(_allocated_bytes(tensor) for tensor in tensors) + _aligned(8 * self.comm.size)
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
        """Steps made by each rank; a rank writes only its own count."""
        begin = _aligned(8 * self.comm.size)
        shared = {}
        for tensor in tensors:
            end = begin + tensor.numel() * tensor.element_size()
            shared[tensor.data_ptr()] = memory[begin:end].view(tensor.dtype).view(tensor.shape)
            if self.comm.rank == 0:
                shared[tensor.data_ptr()].copy_(tensor)
            begin += _allocated_bytes(tensor)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor.data = shared.get(tensor.data_ptr(), tensor.data)
        self.comm.all_reduce(token).wait()

    def fetch_weights(self) -> None:
        """Record how often the weights have been changed so far; they are read in place."""
        self._steps_before = int(self._counts.sum())

    def apply_gradient(self, work_item: int) -> int | None:
        """Step on the shared weights and return how many steps all ranks have made since the gradient was started."""
        staleness = int(self._counts.sum()) - self._steps_before
        for group in self.optimizer.param_groups:
            group["lr"] *= local_lr_scale(self.options, self.context.experiment) / self.comm.size
        self.optimizer.step()
        self._counts[self.comm.rank] += 1
        return staleness

    def counters(self) -> Counters | None:
        """Return None: nothing is sent."""
        return None

    def close(self) -> None:
        """Wait for all ranks, so that no weight changes until the next epoch of the work queue (collective)."""
        import torch

        self.comm.all_reduce(torch.zeros(1)).wait()


def _aligned(size: int) -> int:
    """Round a size up to a multiple of 16 bytes, so that any dtype may follow (complex128 takes 16 bytes)."""
    return -(-size // 16) * 16


def _allocated_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in shared memory."""
    return _aligned(tensor.numel() * tensor.element_size())
