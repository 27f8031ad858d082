"""State that a training pass changes without the optimizer: buffers, and parameters that are not trained.

Examples are a teacher that is a moving average of the model, a codebook, or running statistics. They change once
per pass, so several passes in one step change them more often than one process does with the whole batch. ZeRO 3, which
gathers parameters for a pass and frees them afterwards, loses what was written to them (issue 11).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from labkit.experiment import Experiment
from labkit.experiment.fault import TaskFault

MAX_BYTES = 2**28
"""Size up to which a model's untrained state is copied and compared (bytes)."""


class MovingState:
    """A copy of a model's buffers and untrained parameters, to find those that a pass has changed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        state = _untrained(model)
        fits = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) <= MAX_BYTES
        self._before = {name: tensor.detach().clone() for name, tensor in state.items()} if fits else {}

    def changed(self) -> list[str]:
        """Return the names of the buffers and untrained parameters that differ from the copy."""
        now = _untrained(self._model)
        return [name for name, tensor in self._before.items() if name in now and not _equal(now[name], tensor)]

    def notes(self, experiment: Experiment, counter: str = "") -> list[str]:
        """Return a sentence if several passes per step change this state too often; TaskFault if ZeRO 3 loses it.

        `counter` names a number that the model keeps from pass to pass, such as a count of its passes.
        """
        changed = [*self.changed(), *filter(None, [counter])]
        if not changed:
            return []
        layout = experiment.layout
        frozen = {name for name, parameter in self._model.named_parameters() if not parameter.requires_grad}
        changed_parameters = [name for name in changed if name in frozen]
        if changed_parameters and layout.dp_shard > 1 and layout.zero_stage == 3:
            raise TaskFault(
                f"{changed_parameters[0]} is changed in the forward pass although it is not trained, and ZeRO 3 would "
                "lose the change: register it as a buffer (register_buffer), or set layout.zero_stage to 1 or 2"
            )
        passes = experiment.gradients.accumulation * (layout.microbatches_per_pass if layout.pp > 1 else 1)
        if passes == 1:
            return []
        return [
            f"{changed[0]} changes in every training pass, and a step has {passes} passes, so it changes more often "
            "than in one process with the whole batch"
        ]


def _untrained(model: nn.Module) -> dict[str, Tensor]:
    """Return buffers and untrained parameters by name, except those of batch normalisation, which has its own note."""
    normalised = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, _BatchNorm) and name)
    state: dict[str, Tensor] = dict(model.named_buffers())
    state |= {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(normalised) and not isinstance(model, _BatchNorm) and not tensor.is_meta
    }


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and values; NaN equals NaN."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    same = first == second
    return bool((same | ((first != first) & (second != second))).all())
