"""The driver that the network imitates: it looks one action ahead, at what it can see.

It simulates each of the five actions: every vehicle keeps its speed, its own speed changes at once, and during a lane
change it occupies both lanes. It takes the action with the best score for progress and safety. It decides from the same
numbers that the network gets, so that everything it does can be learned.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ACTIONS = ("lane left", "idle", "lane right", "faster", "slower")
LEFT, IDLE, RIGHT, FASTER, SLOWER = range(5)

LANES = 3
LANE_WIDTH = 4.0
"""Width of a lane (m)."""
LENGTH = 5.0
"""Length of a vehicle (m)."""
SPEEDS = (15.0, 20.0, 25.0, 30.0)
"""Speeds that the driver can ask for (m/s)."""

_TIMES = np.arange(0.0, 3.01, 0.25)
_FRONT_MARGIN_S = 0.5
_REAR_MARGIN_M = 4.0


def expert_action(observation: NDArray[np.float32]) -> int:
    """Return the action for an observation [vehicles, 5] of presence, x, y, vx, vy (m, m/s).

    Row 0 is the driver itself with its y and speed; the others are relative to it. Absent rows are zero.
    """
    lane = int(np.clip(round(float(observation[0, 2]) / LANE_WIDTH), 0, LANES - 1))
    level = int(np.abs(np.array(SPEEDS) - observation[0, 3]).argmin())
    options = {IDLE: (lane, level)}
    if lane > 0:
        options[LEFT] = (lane - 1, level)
    if lane < LANES - 1:
        options[RIGHT] = (lane + 1, level)
    if level < len(SPEEDS) - 1:
        options[FASTER] = (lane, level + 1)
    if level > 0:
        options[SLOWER] = (lane, level - 1)
    scores = {
        action: _score(observation, lane, *target) - 0.05 * (action != IDLE) for action, target in options.items()
    }
    return max(scores, key=lambda action: scores[action])


def _score(observation: NDArray[np.float32], lane: int, new_lane: int, level: int) -> float:
    """Return progress in units of 10 m/s, minus a large penalty for coming too close."""
    speed = SPEEDS[level]
    others = observation[1:][observation[1:, 0] > 0.5]
    x, speeds = others[:, 1], others[:, 3] + observation[0, 3]
    lateral = others[:, 2] + observation[0, 2]
    drift = others[:, 4] + (observation[0, 4] if len(others) else 0.0)

    def inside(number: int) -> NDArray[np.bool_]:
        """Return which vehicles are in this lane now or, at their present drift, in a second."""
        centre, reach = number * LANE_WIDTH, 0.65 * LANE_WIDTH
        within: NDArray[np.bool_] = (np.abs(lateral - centre) < reach) | (np.abs(lateral + drift - centre) < reach)
        return within

    # Gaps over time, [vehicles, times]; vehicles next to or behind the driver matter when it enters their lane.
    ahead = x[:, None] + (speeds - speed)[:, None] * _TIMES
    concerned = inside(new_lane)
    if new_lane != lane:
        leaving = inside(lane) & (x > 0)
        shortfall = _shortfall(ahead[concerned], x[concerned], speed) + _shortfall(
            ahead[leaving][:, _TIMES <= 1.0], x[leaving], speed
        )
    else:
        front = concerned & (x > 0)
        shortfall = _shortfall(ahead[front], x[front], speed)

    leaders = concerned & (x > 0)
    pace = 30.0
    if leaders.any():
        first = int(np.flatnonzero(leaders)[x[leaders].argmin()])
        pace = min(pace, float(speeds[first] + max(0.0, x[first] - 25.0) / 4))
    return 0.1 * speed + 0.1 * pace + 0.15 * new_lane - 4.0 * shortfall


def _shortfall(ahead: NDArray[np.float32], x: NDArray[np.float32], speed: float) -> float:
    """Return the missing fraction of the safe distance at the worst moment: 0 for none, 1 for contact, up to 2."""
    if not len(x):
        return 0.0
    front_margin = _FRONT_MARGIN_S * speed
    front = (front_margin - (ahead.min(1) - LENGTH)) / front_margin
    rear = (_REAR_MARGIN_M - (-ahead.max(1) - LENGTH)) / _REAR_MARGIN_M
    return float(np.clip(np.where(x > 0, front, rear), 0.0, 2.0).max())
