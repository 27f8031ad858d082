"""The dense float32 run beside which a sparse or narrow one is set."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.experiment import Experiment

ALIKE = ("workload", "layout", "gradients", "optimizer.name", "training.global_batch", "launch.device")
ALIKE_IN_SPEED = (
    "launch.threads_per_rank",
    "launch.network",
    "launch.slowdown",
    "launch.isolated",
    "launch.transport",
    "training.shares",
    "training.loader_workers",
    "training.gradient_norm",
    "optimizer.clip_norm",
)


def is_dense(experiment: Experiment) -> bool:
    """Is every weight used, and every number a float32?"""
    settings = experiment.quantization
    narrow = settings.training != "fp32" or settings.qat != "none" or experiment.optimizer.state_bits != 32
    return not narrow and experiment.sparsity.method == "none"


def beside(one: Experiment, others: Sequence[Experiment | None]) -> int | None:
    """Which of the others `one` is compared with: dense, alike in all that matters for speed; None if there is none.

    Of several the one that trained as long, with the same seed and learning rate.
    """
    fitting = [at for at, other in enumerate(others) if other is not None and is_dense(other) and _alike(one, other)]

    def apart(at: int) -> int:
        other = others[at]
        assert other is not None
        pairs = [(one.training.steps, other.training.steps), (one.training.seed, other.training.seed)]
        return sum(
            a != b
            for a, b in [*pairs, (one.training.epochs, other.training.epochs), (one.optimizer.lr, other.optimizer.lr)]
        )

    return min(fitting, key=apart, default=None)


def _alike(one: Experiment, other: Experiment) -> bool:
    return all(_at(one, name) == _at(other, name) for name in (*ALIKE, *ALIKE_IN_SPEED))


def _at(experiment: Experiment, name: str) -> object:
    found: object = experiment
    for part in name.split("."):
        found = getattr(found, part)
    return found
