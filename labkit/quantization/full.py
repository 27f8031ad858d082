"""Full precision: float32, and float64 for proofs; also the base class of all precisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options as BaseOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment
    from labkit.experiment.sections import Quantization
    from labkit.quantization.linear import QuantizedLinearOp


class Single:
    """Trains in float32 throughout, without TF32 or any other shortcut."""

    class Options(BaseOptions):
        pass

    mixed_precision: ClassVar[str] = "no"
    """Value of Accelerate's `mixed_precision`."""
    products: ClassVar[str] = "fp32"
    """Number format of most matrix products, as data sheets name it. A class declares its own and inherits none."""
    own_optimizer: ClassVar[bool] = False
    """Whether weights need an optimizer that rounds them (labkit.quantization.optimizers)."""
    layers_from: ClassVar[str] = ""
    """Library whose layers take the place of torch's linear layers (`labkit`, `torchao`); empty if none do."""
    computes_with_stored_weights: ClassVar[bool] = True
    """Whether layers compute with the weights that they store, and not with rounded ones."""

    @staticmethod
    def prepare() -> None:
        """Disable TF32, to which torch rounds convolutions on GPUs by default (10 bits of mantissa)."""
        import torch

        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False

    @staticmethod
    def dtype() -> torch.dtype:
        """Return the dtype of weights and inputs."""
        import torch

        return torch.float32

    @staticmethod
    def handlers() -> list[Any]:
        """Return keyword handlers for Accelerate."""
        return []

    @classmethod
    def warnings(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Yield a warning if float32, and not a format derived from it, keeps the tensor cores of a GPU idle."""
        if cls is Single and experiment.launch.device == "cuda" and not machine.lacks_capability("TF32 needs", (8, 0)):
            yield Problem(
                "quantization.training", "fp32 runs without tensor cores: tf32 and bf16 are many times faster"
            )

    @staticmethod
    def arithmetic(settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """Return a factory of the arithmetic of a linear layer; None to use torch's own."""
        return None


class Double(Single):
    """Trains in float64 throughout, where rounding errors are too small to hide a wrong layout."""

    @staticmethod
    def dtype() -> torch.dtype:
        import torch

        return torch.float64


class Unquantized(Single):
    """Does not quantize."""
