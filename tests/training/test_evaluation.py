"""How many held-out samples are evaluated at once. On the CPU; a device is only named."""

import pytest
import torch

from labkit.experiment import Experiment
from labkit.training.evaluation import BATCH, batch_size

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ("training.global_batch=16", CPU, BATCH),
        ("training.global_batch=16", GPU, 16),
        ("training.global_batch=10_000", GPU, BATCH),
        ("training.global_batch=64 layout=dp2·tp2 gradients.accumulation=4", GPU, 8),
        ("training.global_batch=17 layout=dp2", GPU, 9),
    ],
)
def test_on_a_gpu_no_more_samples_than_in_training(changes: str, device: torch.device, expected: int) -> None:
    assert batch_size(Experiment().replace(*changes.split()), device) == expected
