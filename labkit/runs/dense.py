"""The dense float32 run with which a sparse or low-precision run is compared."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.experiment import Experiment
from labkit.experiment.sections import AUTO

SAME_SETTINGS = ("workload", "layout", "gradients", "optimizer.name", "training.global_batch", "launch.device")
SAME_SPEED_SETTINGS = (
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
    """Return whether every weight is used and every tensor is float32."""
    settings = experiment.quantization
    narrow = settings.training not in (AUTO, "fp32") or settings.qat != "none" or experiment.optimizer.state_bits != 32
    return not narrow and experiment.sparsity.method == "none"


def find_dense_reference(experiment: Experiment, candidates: Sequence[Experiment | None]) -> int | None:
    """Return the index of the dense candidate with the same settings that matter for speed, or None if there is none.

    Among several, the one with the fewest differences in steps, epochs, seed and learning rate is chosen.
    """
    dense = [
        index
        for index, candidate in enumerate(candidates)
        if candidate is not None and is_dense(candidate) and _comparable(experiment, candidate)
    ]

    def mismatches(index: int) -> int:
        candidate = candidates[index]
        assert candidate is not None
        pairs = [
            (experiment.training.steps, candidate.training.steps),
            (experiment.training.seed, candidate.training.seed),
        ]
        return sum(
            own != its
            for own, its in [
                *pairs,
                (experiment.training.epochs, candidate.training.epochs),
                (experiment.optimizer.lr, candidate.optimizer.lr),
            ]
        )

    return min(dense, key=mismatches, default=None)


def _comparable(a: Experiment, b: Experiment) -> bool:
    return all(_setting(a, name) == _setting(b, name) for name in (*SAME_SETTINGS, *SAME_SPEED_SETTINGS))


def _setting(experiment: Experiment, name: str) -> object:
    value: object = experiment
    for part in name.split("."):
        value = getattr(value, part)
    return value
