"""All gradients of a model as one vector, as update rules send them.

Where a pass may leave parameters without a gradient (a branch that is not taken, a layer that nothing uses), the vector
also holds one count per parameter: how many of the summed vectors had a gradient for it. A parameter without a gradient
on any rank gets none back, so that the optimizer leaves it alone as it does in one process; with a gradient of zeros it
would decay and follow its momentum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labkit.gradients.updates.average import flatten, unflatten_into


class GradientVector:
    """Reads the gradients of a model's trained parameters into a vector, and writes such a vector back."""

    def __init__(self, model: nn.Module, irregular: bool) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._irregular = irregular

    def read(self) -> Tensor:
        """Return a new vector of all gradients in the order of the model, zeros where there is none, and the counts."""
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self._parameters]
        values = flatten(gradients)
        if not self._irregular:
            return values
        counts = [float(parameter.grad is not None) for parameter in self._parameters]
        return torch.cat([values, values.new_tensor(counts)])

    def write(self, vector: Tensor) -> None:
        """Give the parameters the gradients in `vector`; None to those whose count is zero."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        unflatten_into([parameter.grad for parameter in self._parameters if parameter.grad is not None], vector)
        if self._irregular:
            counts = vector[len(vector) - len(self._parameters) :].tolist()
            for parameter, count in zip(self._parameters, counts, strict=True):
                parameter.grad = parameter.grad if count else None

    def empty(self) -> Tensor:
        """Return an uninitialised vector of the right length and dtype on the CPU."""
        return torch.empty_like(self.read(), device="cpu")

    @property
    def nbytes(self) -> int:
        """Size of one vector in bytes."""
        vector = self.read()
        return vector.numel() * vector.element_size()
