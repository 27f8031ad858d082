"""The driving task: recorded drives to learn from, and a simulated road to test on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from labkit.workloads import driving_data
from labkit.workloads.base import ClassificationTask, TensorData
from labkit.workloads.expert import ACTIONS
from labkit.workloads.models.driver import driver
from labkit.workloads.seed import seeded

ROAD_SEED = 2_000_000
"""First seed of the closed-loop episodes, which are neither recorded nor measured for the facts."""


class DrivingTask(ClassificationTask):
    """Observation [N, 40] to the logits of five actions [N, 5]; separate episodes are held out."""

    def __init__(self, width: int, depth: int, episodes: int, seed: int) -> None:
        arrays, about = driving_data.load()
        x = torch.from_numpy(driving_data.normalise(arrays["seen"]))
        y = torch.from_numpy(arrays["action"]).long()
        test = torch.from_numpy(arrays["episode"] >= about["first_test_episode"])
        _, vehicles, features = arrays["seen"].shape
        with seeded(seed):
            model = driver(vehicles, features, len(ACTIONS), width, depth)
        super().__init__(
            model,
            TensorData(x=x[~test], y=y[~test]),
            TensorData(x=x[test], y=y[test]),
            classes=list(ACTIONS),
            majority_share=about["majority_share"],
            train_samples=int((~test).sum()),
            test_samples=int(test.sum()),
            drivers=about["drivers"],
            drivers_measured_on=about["measured_episodes"],
        )
        self.episodes = episodes

    def closed_loop(self, model: nn.Module, rank: int, world_size: int, seed: int) -> dict[str, float]:
        """Drive this rank's episodes (every `world_size`-th); return sums of distance (m), crashes and episodes."""
        episode_numbers = range(rank, self.episodes, world_size)
        if not episode_numbers:
            return {"episodes": 0.0, "distance_m": 0.0, "crashes": 0.0} if self.episodes else {}
        from labkit.workloads.highway import Highway, drive

        parameter = next(model.parameters())

        def act(observation: Any) -> int:
            x = torch.from_numpy(driving_data.normalise(observation)).to(parameter.device, parameter.dtype)
            return int(model(x.unsqueeze(0)).argmax())

        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                env = Highway()
                drives = [drive(env, ROAD_SEED + 10_000 * seed + number, act) for number in episode_numbers]
        finally:
            model.train(was_training)
        return {
            "episodes": float(len(drives)),
            "distance_m": sum(distance for distance, _ in drives),
            "crashes": float(sum(crashed for _, crashed in drives)),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        metrics = super().metrics(sums)
        if sums.get("episodes"):
            metrics["distance_m"] = sums["distance_m"] / sums["episodes"]
            metrics["crash_rate"] = sums["crashes"] / sums["episodes"]
        return metrics
