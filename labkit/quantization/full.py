"""Full precision: float32 as trained, float64 for proofs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.experiment.registry import Options as BaseOptions

if TYPE_CHECKING:
    import torch


class Single:
    """float32 throughout, without TF32 or any other shortcut."""

    class Options(BaseOptions):
        pass

    mixed_precision = "no"

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


class Double(Single):
    """float64 throughout: rounding is so small that a wrong layout cannot hide behind it."""

    @staticmethod
    def dtype() -> torch.dtype:
        import torch

        return torch.float64


class Unquantized:
    """Numbers stay as they are."""

    class Options(BaseOptions):
        pass
