"""The simulator: highway-env (Leurent 2018) with three lanes, dense traffic, and five actions, one per second.

It imports gymnasium and highway-env, so only the closed loop, the recorder and tests import this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # highway-env loads pygame, which prints an advertisement

import numpy as np
from highway_env.envs.common.observation import KinematicObservation
from highway_env.envs.highway_env import HighwayEnv
from numpy.typing import NDArray

from labkit.workloads.expert import LANES, SPEEDS

VEHICLES = 8
"""Rows of an observation: the driver and the nearest vehicles."""
FEATURES = ("presence", "x", "y", "vx", "vy")
DURATION_S = 20

SETTING: dict[str, Any] = {
    "observation": {"type": "Kinematics"},
    "action": {"type": "DiscreteMetaAction", "target_speeds": list(SPEEDS)},
    "lanes_count": LANES,
    "vehicles_count": 12,
    "vehicles_density": 1.3,
    "duration": DURATION_S,
    "simulation_frequency": 5,
    "policy_frequency": 1,
}

Driver = Callable[[NDArray[np.float32]], int]


class Kinematics(KinematicObservation):  # type: ignore[misc]
    """highway-env's Kinematics observation in metres, without its data frame: a third of the time per step."""

    def observe(self) -> NDArray[np.float32]:
        """Return [VEHICLES, 5]: presence, x, y, vx, vy; row 0 the driver (x is 0), then the nearest vehicles.

        Their positions and speeds are relative to the driver.
        """
        ego, rows = self.observer_vehicle, np.zeros((VEHICLES, len(FEATURES)), dtype=np.float32)
        if not self.env.road:  # highway-env asks once before there is a road
            return rows
        rows[0] = (1, 0, ego.position[1], *ego.velocity)
        near = self.env.road.close_objects_to(
            ego, self.env.PERCEPTION_DISTANCE, count=VEHICLES - 1, see_behind=True, sort=True, vehicles_only=True
        )
        for row, vehicle in zip(rows[1:], near, strict=False):
            row[:] = (1, *(vehicle.position - ego.position), *(vehicle.velocity - ego.velocity))
        return rows


class Highway(HighwayEnv):  # type: ignore[misc]
    """highway-env's road with labkit's settings."""

    def __init__(self) -> None:
        super().__init__(config=SETTING)

    def define_spaces(self) -> None:
        """Set the observation type; highway-env calls this at each reset."""
        super().define_spaces()
        self.observation_type = Kinematics(self, list(FEATURES), VEHICLES)
        self.observation_space = self.observation_type.space()


def episode(env: Highway, seed: int, driver: Driver) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Drive until a crash or the end; yield each observation with the action taken."""
    observation, _ = env.reset(seed=seed)
    over = False
    while not over:
        action = driver(observation)
        yield observation, action
        observation, _, crashed, timeout, _ = env.step(action)
        over = crashed or timeout


def drive(env: Highway, seed: int, driver: Driver) -> tuple[float, bool]:
    """Drive one episode; return the distance (m), and whether it ended in a crash."""
    start: float | None = None
    for _ in episode(env, seed, driver):
        if start is None:
            start = float(env.vehicle.position[0])
    return float(env.vehicle.position[0]) - (start or 0.0), bool(env.vehicle.crashed)


def random_driver(seed: int) -> Driver:
    """Return a driver that takes any of the five actions with equal probability."""
    random = np.random.default_rng(seed)
    return lambda observation: int(random.integers(5))
