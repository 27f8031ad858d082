"""Expected bytes of model state per rank: the formulas of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).

For Ψ parameters in the rank's part of the model (after sharding by tp, ep and pp), b bytes each, an optimizer with k
values of state per parameter (Adam 2, SGD with momentum 1) and N = dp_shard:

| stage         | parameters | gradients | optimizer |
|---------------|------------|-----------|-----------|
| 0 (no ZeRO)   | bΨ         | bΨ        | k·bΨ      |
| 1             | bΨ         | bΨ        | k·bΨ / N  |
| 2             | bΨ         | bΨ / N    | k·bΨ / N  |
| 3             | bΨ / N     | bΨ / N    | k·bΨ / N  |

An asynchronous pipeline stashes versions of its trained parameters: one for each minibatch in flight except the next
(PipeDream, Narayanan et al. 2019), and one more if weights are predicted. Activations have no formula here: they
depend on the batch, not on the number of parameters.

Moments are as wide as the weights, except that they are float32 with bfloat16 weights; with 8 bits
(optimizer.state_bits) they take a byte each plus 4 bytes for every 256 (tensors of fewer than 4096 elements keep 32
bits, which the formula ignores).
"""

from __future__ import annotations

from labkit.experiment.schema import Experiment

STATES = ("parameters", "gradients", "optimizer")
"""Components of the model state, in the order in which plots stack them."""
KINDS = (*STATES, "stash", "activations")
"""Everything that is measured; `stash` only where weights are stashed."""


def moments_per_parameter(experiment: Experiment) -> int:
    """Return how many values per parameter the optimizer stores."""
    optimizer = experiment.optimizer
    return 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)


def zero_stage(experiment: Experiment) -> int:
    """Return the ZeRO stage in use; 0 if nothing is sharded."""
    return experiment.layout.zero_stage if experiment.layout.dp_shard > 1 else 0


def model_state_bytes(experiment: Experiment, parameter_bytes: int, trainable_bytes: int) -> dict[str, float]:
    """Return the expected bytes of parameters, gradients and optimizer state on a rank.

    `parameter_bytes` counts all parameters in the rank's part of the model, unsharded (bΨ above); `trainable_bytes`
    counts those that are not frozen, the only ones with gradients and optimizer state.
    """
    stage, ranks = zero_stage(experiment), experiment.layout.dp_shard
    unsharded = {
        "parameters": float(parameter_bytes),
        "gradients": float(trainable_bytes),
        "optimizer": moments_per_parameter(experiment) * trainable_bytes * _moment_bytes(experiment),
    }
    sharded = {"parameters": stage >= 3, "gradients": stage >= 2, "optimizer": stage >= 1}
    return {name: size / ranks if sharded[name] else size for name, size in unsharded.items()}


def _moment_bytes(experiment: Experiment) -> float:
    """Return the bytes of a moment as a multiple of those of a weight."""
    weight_ratio = 2.0 if experiment.quantization.training == "pure_bf16" else 1.0
    return weight_ratio if experiment.optimizer.state_bits == 32 else weight_ratio * (1 + 4 / 256) / 4


def stash_bytes(experiment: Experiment, ahead: int, trainable_bytes: int) -> float:
    """Return the bytes of stashed weights of a stage that runs `ahead` forward passes ahead of its backward passes.

    `trainable_bytes` is as in `model_state_bytes`.
    """
    layout = experiment.layout
    if not (layout.order.asynchronous and layout.weight_stashing and ahead):
        return 0.0
    return float((ahead + (layout.weight_prediction > 0)) * trainable_bytes)
