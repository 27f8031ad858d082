"""Recreate the driving data set: `python -m labkit.workloads.record_driving [--episodes N] [--out FOLDER]`.

The expert drives seeded episodes. In one step of five the car does something random instead, so that the recording also
shows how to recover from a bad position; the recorded action is always what the expert would have done (Laskey et al.
2017, arXiv:1703.09327). The same versions of the packages give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from labkit.workloads import driving_data
from labkit.workloads.expert import ACTIONS, expert_action
from labkit.workloads.highway import FEATURES, SETTING, VEHICLES, Highway, drive, episode, random_driver

EPISODES = 1500
TEST_SHARE = 0.2
NOISE = 0.2
MEASURED_EPISODES = 200
MEASURE_SEED = 1_000_000
"""First seed of the measured drives, far from those of the recorded ones."""


def record(episodes: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return arrays `seen` [samples, VEHICLES, 5] float16, `action` [samples] uint8, `episode` [samples] uint16."""
    env = Highway()
    seen, actions, numbers = [], [], []
    for number in range(episodes):
        noise = np.random.default_rng(number)

        def driver(observation: Any, noise: np.random.Generator = noise) -> int:
            return int(noise.integers(len(ACTIONS))) if noise.random() < NOISE else expert_action(observation)

        for observation, _ in episode(env, number, driver):
            seen.append(observation.astype(np.float16))
            actions.append(expert_action(observation))
            numbers.append(number)
    return {
        "seen": np.stack(seen),
        "action": np.array(actions, dtype=np.uint8),
        "episode": np.array(numbers, dtype=np.uint16),
    }


def measure(episodes: int) -> dict[str, dict[str, float]]:
    """Return distance (m per episode) and crash rate of the expert and of a random driver on the same roads."""
    env = Highway()
    drivers = {"expert": expert_action, "random": random_driver(0)}
    result = {}
    for name, driver in drivers.items():
        drives = [drive(env, MEASURE_SEED + number, driver) for number in range(episodes)]
        result[name] = {
            "distance_m": round(sum(distance for distance, _ in drives) / episodes, 1),
            "crash_rate": round(sum(crashed for _, crashed in drives) / episodes, 4),
        }
    return result


def describe(arrays: dict[str, np.ndarray[Any, Any]], episodes: int, measured: int) -> dict[str, Any]:
    """Return the content of the JSON file next to the data."""
    first_test = episodes - round(TEST_SHARE * episodes)
    held_out = arrays["action"][arrays["episode"] >= first_test]
    return {
        "what": "an expert drives in highway-env; from what it sees, its action is to be predicted",
        "made_by": "python -m labkit.workloads.record_driving",
        "episodes": episodes,
        "first_test_episode": first_test,
        "samples": len(arrays["action"]),
        "train_samples": len(arrays["action"]) - len(held_out),
        "observation": {"vehicles": VEHICLES, "features": list(FEATURES), "units": "m, m/s"},
        "actions": list(ACTIONS),
        "action_share": [round(float((arrays["action"] == a).mean()), 4) for a in range(len(ACTIONS))],
        "majority_share": float(np.bincount(held_out).max() / len(held_out)),
        "noise": NOISE,
        "measured_episodes": measured,
        "drivers": measure(measured),
        "setting": SETTING,
        "versions": {name: version(name) for name in ("highway-env", "gymnasium", "numpy")},
        "licence": "made by labkit, Apache-2.0",
    }


def main() -> None:
    """Record, measure and write; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m labkit.workloads.record_driving", description=__doc__)
    parser.add_argument("--episodes", type=int, default=EPISODES, help="episodes to record")
    parser.add_argument("--measure", type=int, default=MEASURED_EPISODES, help="episodes to measure each driver on")
    parser.add_argument("--out", type=Path, default=driving_data.FOLDER, help="folder to write to")
    arguments = parser.parse_args()
    if min(arguments.episodes, arguments.measure) < 1:
        parser.error("give at least one episode")
    arrays = record(arguments.episodes)
    about = describe(arrays, arguments.episodes, arguments.measure)
    driving_data.write(arguments.out, arrays, about)
    shown = {key: about[key] for key in ("samples", "action_share", "majority_share", "drivers")}
    print(json.dumps(shown, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
