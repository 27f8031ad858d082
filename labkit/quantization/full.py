"""Full precision: float32 as trained, float64 for proofs. Also the base of all number formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from labkit.experiment.registry import Options as BaseOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from labkit.experiment.schema import Quantization
    from labkit.quantization.linear import QuantizedLinearOp


class Single:
    """float32 throughout, without TF32 or any other shortcut."""

    class Options(BaseOptions):
        pass

    mixed_precision: ClassVar[str] = "no"
    """What Accelerate is told."""
    own_optimizer: ClassVar[bool] = False
    """Do weights need an optimizer that rounds them (labkit.quantization.optimizers)?"""

    @staticmethod
    def prepare() -> None:
        """Switch off what rounds behind the user's back: on GPUs convolutions take TF32 (10 bits) by default."""
        import torch

        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False

    @staticmethod
    def dtype() -> torch.dtype:
        """Type of weights and inputs."""
        import torch

        return torch.float32

    @staticmethod
    def handlers() -> list[Any]:
        """Keyword handlers for Accelerate."""
        return []

    @staticmethod
    def arithmetic(settings: Quantization) -> Callable[[], QuantizedLinearOp] | None:
        """What makes the arithmetic of a linear layer; None where torch's own is right."""
        return None


class Double(Single):
    """float64 throughout: rounding is so small that a wrong layout cannot hide behind it."""

    @staticmethod
    def dtype() -> torch.dtype:
        import torch

        return torch.float64


class Unquantized(Single):
    """Numbers stay as they are."""
