"""Late compressors freeze Adam's mean squares v; what masks do to weights must not unfreeze it. CPU, one process."""

from __future__ import annotations

import torch

from labkit.experiment import Optimizer
from labkit.gradients.compression.frozen_adamw import FrozenAdamW


def frozen(mean_squares: list[float]) -> tuple[FrozenAdamW, torch.nn.Parameter]:
    """Return an optimizer whose warm-up of one update is over, and its parameter with these v (bias-corrected)."""
    parameter = torch.nn.Parameter(torch.ones(len(mean_squares)))
    optimizer = FrozenAdamW([{"params": [parameter], "weight_decay": 0.0}], Optimizer(eps=1e-12), warmup=1)
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4)}
    optimizer.state[parameter] = state | {"exp_avg_sq": torch.tensor(mean_squares) * (1 - 0.999)}
    return optimizer, parameter


def test_weights_that_a_mask_covered_take_the_mean_of_the_others() -> None:
    optimizer, parameter = frozen([4.0, 0.0, 12.0, 8.0])
    optimizer.masks_changed()
    expected = torch.tensor([4.0, 8.0, 12.0, 8.0]).sqrt()
    torch.testing.assert_close(optimizer.denominator(parameter), expected)


def test_without_masks_a_zero_is_a_measurement() -> None:
    optimizer, parameter = frozen([4.0, 0.0, 12.0, 8.0])
    assert float(optimizer.denominator(parameter)[1]) < 0.05


def test_mean_squares_are_frozen_once_the_warm_up_is_over() -> None:
    optimizer, parameter = frozen([4.0, 1.0, 12.0, 8.0])
    assert optimizer.frozen_state == {"exp_avg_sq"}
    early = FrozenAdamW([{"params": [parameter], "weight_decay": 0.0}], Optimizer(), warmup=5)
    assert early.frozen_state == frozenset()


def test_denominators_follow_a_state_that_was_moved() -> None:
    optimizer, parameter = frozen([4.0, 1.0, 9.0, 16.0])
    before = optimizer.denominator(parameter).clone()
    state = optimizer.state[parameter]
    state["exp_avg_sq"].copy_(state["exp_avg_sq"].flip(0))  # a CSR layer stores its values in another order
    optimizer.masks_changed()
    torch.testing.assert_close(optimizer.denominator(parameter), before.flip(0))
