"""The number of ranks along each axis of the device mesh, and the coordinates of each rank.

The class follows torchtitan's `ParallelDims` (axis sizes in, validation at once, the error prints the equation); the
axis names are those of Accelerate's `ParallelismConfig`, with `pp` and `ep`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import prod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from labkit.experiment.problem import OptionError, closest
from labkit.experiment.registry import registry
from labkit.experiment.schedules import SCHEDULES, Schedule, schedule_of

AXES = ("dp_replicate", "dp_shard", "cp", "tp", "ep", "pp")
# Outermost first: neighbours along the last axis are closest to each other.
MESH_ORDER = ("pp", "dp_replicate", "dp_shard", "cp", "ep", "tp")
DATA_AXES = ("dp_replicate", "dp_shard", "ep")
"""Axes along which ranks see different samples."""
SHORT = {"dp_replicate": "dp", "dp_shard": "shard", "cp": "cp", "tp": "tp", "ep": "ep", "pp": "pp"}
_LONG = {short: axis for axis, short in SHORT.items()} | {"dp_shard": "dp_shard", "dp_replicate": "dp_replicate"}

AxisSize = Field(default=1, ge=-1, le=1_000_000)


class Layout(BaseModel):
    """How a model and its batch are distributed over ranks. One axis may be -1, "the rest of the ranks"."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    dp_replicate: int = AxisSize
    """Replicas of the model; each processes its share of every batch (data parallelism, DDP)."""
    dp_shard: int = AxisSize
    """Ranks over which parameters, gradients or optimizer state are sharded (ZeRO, FSDP)."""
    tp: int = AxisSize
    """Ranks over which the weights of each layer are sharded (tensor parallelism)."""
    cp: int = AxisSize
    """Ranks over which the sequence is sharded (context parallelism)."""
    ep: int = AxisSize
    """Ranks over which experts are distributed (expert parallelism)."""
    pp: int = AxisSize
    """Ranks over which the layers are distributed as pipeline stages (pipeline parallelism)."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel layers along the sequence."""
    zero_stage: Literal[1, 2, 3] = 3
    """What dp_shard shards: 1 optimizer state, 2 also gradients, 3 also parameters."""
    schedule: str = "1f1b"
    """Order of forward and backward passes in the pipeline; in pipedream, no stage waits for a step to end."""
    microbatches: int = Field(default=1, ge=1, le=1_000_000)
    """Micro-batches per step in the pipeline."""
    stages_per_rank: int = Field(default=1, ge=1, le=1_000_000)
    """Pipeline stages on each rank (interleaved schedules need 2 or more)."""
    balance: Literal["blocks", "parameters", "cost"] = "blocks"
    """What is balanced between stages: the number of blocks, of parameters, or the measured time of a micro-batch."""
    stage_blocks: tuple[Annotated[int, Field(le=1_000_000)], ...] | None = None
    """Number of blocks of each stage, set by hand; empty to let `balance` decide."""
    weight_stashing: bool = True
    """With pipedream, keep the weights of a forward pass for its backward pass; turn off to see why that is needed."""
    weight_prediction: float = Field(default=2.0, ge=0, le=10)
    """With weight stashing, how far ahead weights are predicted, in multiples of the staleness; 0 in the paper."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Which activations are recomputed in the backward pass: none, all but matrix products, or all within a block."""
    cpu_offload: bool = False
    """Keep sharded parameters, gradients and optimizer state in host memory (ZeRO 3 on GPUs)."""

    @model_validator(mode="before")
    @classmethod
    def _from_any_form(cls, data: Any) -> Any:
        return cls.read_short_form(data)

    @classmethod
    def read_short_form(cls, data: Any) -> Any:
        """Return the sizes of the axes if `data` is a short form such as `dp2·tp2`, else `data`.

        Raises ValueError if it is a text that cannot be read.
        """
        if type(data) is int and data == 1:  # the short form of one process, read as JSON
            return {}
        return cls._parse(data) if isinstance(data, str) else data

    @field_validator(*AXES)
    @classmethod
    def _no_zero(cls, size: int) -> int:
        if size == 0:
            raise ValueError("must be at least 1, or -1 for the rest of the ranks")
        return size

    @field_validator("schedule")
    @classmethod
    def _schedule_exists(cls, schedule: str) -> str:
        if schedule not in SCHEDULES and schedule not in registry("layout.schedule"):
            names = registry("layout.schedule").names()
            raise OptionError("", f"unknown schedule {schedule!r}; known: {', '.join(names)}", closest(schedule, names))
        return schedule

    @model_validator(mode="after")
    def _one_rest(self) -> Layout:
        rest = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(rest) > 1:
            raise ValueError(f"only one axis can be -1 (the rest), got {' and '.join(rest)}")
        return self

    @staticmethod
    def _parse(text: str) -> dict[str, int]:
        sizes: dict[str, int] = {}
        if text.strip() in ("", "1"):
            return sizes
        for part in re.split(r"[·*x,\s]+", text.strip()):
            match = re.fullmatch(r"([a-z_]+?)(-?\d+)", part)
            axis = _LONG.get(match[1]) if match else None
            if match is None or axis is None:
                raise ValueError(f"cannot read {part!r} in layout {text!r}; write it like dp2·tp2·pp2")
            if axis in sizes:
                raise ValueError(f"axis {axis} appears twice in layout {text!r}")
            sizes[axis] = int(match[2])
        return sizes

    @classmethod
    @lru_cache(maxsize=4096)
    def parse(cls, text: str) -> Layout:
        """Read the short form, `dp2·tp2·pp2` (also separated by `*`, `x`, a comma or a space)."""
        return cls(**cls._parse(text))

    def __str__(self) -> str:
        parts = [f"{SHORT[axis]}{getattr(self, axis)}" for axis in AXES if getattr(self, axis) != 1]
        return "·".join(parts) or "1"

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis, outermost first."""
        return {axis: getattr(self, axis) for axis in MESH_ORDER}

    @property
    def shards_weights(self) -> bool:
        """True if some weights are sharded or cut into stages, so that no rank keeps the whole model."""
        return self.pp > 1 or self.tp > 1 or self.ep > 1 or (self.dp_shard > 1 and self.zero_stage == 3)

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the axes. Raises ValueError if an axis is -1."""
        if -1 in self.sizes.values():
            raise ValueError(f"layout {self} has an open axis (-1); give the number of ranks with resolve()")
        return prod(self.sizes.values())

    @property
    def data_parallel(self) -> int:
        """Number of ranks that see different samples."""
        return prod(getattr(self, axis) for axis in DATA_AXES)

    def resolve(self, world_size: int) -> Layout:
        """Return a copy with the axis that is -1 filled in.

        Raises ValueError, with the equation, if the product is not `world_size`.
        """
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        fixed = prod(size for size in self.sizes.values() if size != -1)
        rest = [axis for axis, size in self.sizes.items() if size == -1]
        if rest and world_size % fixed == 0:
            return self.model_copy(update={rest[0]: world_size // fixed})
        if rest or fixed != world_size:
            raise ValueError(self.equation(world_size))
        return self

    def equation(self, world_size: int) -> str:
        """Return why the sizes do not make `world_size`: `dp_replicate 2 × tp 2 × pp 1 = 4, but world_size is 8`."""
        shown = [axis for axis in AXES if axis in ("dp_replicate", "tp", "pp") or getattr(self, axis) != 1]
        fixed = prod(size for size in self.sizes.values() if size != -1)
        factors = " × ".join(f"{axis} {'?' if getattr(self, axis) == -1 else getattr(self, axis)}" for axis in shown)
        if -1 in self.sizes.values():
            return f"{factors} cannot be {world_size}: {fixed} does not divide world_size {world_size}"
        return f"{factors} = {fixed}, but world_size is {world_size}"

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the coordinate of `rank` on every axis (row-major in `MESH_ORDER`)."""
        place: dict[str, int] = {}
        for axis in reversed(MESH_ORDER):
            size = getattr(self, axis)
            place[axis] = rank % size
            rank //= size
        return {axis: place[axis] for axis in MESH_ORDER}

    def share(self, rank: int) -> int:
        """Return which of the `data_parallel` shares of every batch belongs to `rank`."""
        place, share = self.coordinates(rank), 0
        for axis in DATA_AXES:
            share = share * getattr(self, axis) + place[axis]
        return share

    def stages(self, place: int) -> list[int]:
        """Return the numbers of the pipeline stages at coordinate `place` along pp, in the order of the chain.

        Of a schedule that is not known in this process (`order.is_known`) it may be another distribution.
        """
        count = self.pp * self.stages_per_rank
        if self.order.fold:
            return [place, count - 1 - place]
        return list(range(place, count, self.pp))

    @property
    def order(self) -> Schedule:
        """What labkit knows of the pipeline schedule."""
        return schedule_of(self.schedule)

    @property
    def splits_backward(self) -> bool:
        """Whether a pipeline computes the gradients of inputs and of weights at different times."""
        return self.pp > 1 and self.order.splits_backward

    @property
    def microbatches_per_pass(self) -> int:
        """Number of micro-batches into which a pipeline splits the samples of a pass."""
        return 1 if self.order.single_microbatch else self.microbatches

    def grid(self) -> list[dict[str, Any]]:
        """Return the rank table that the notebook draws: one row per rank, with coordinates on axes larger than one."""
        return [
            {"rank": rank} | {axis: index for axis, index in self.coordinates(rank).items() if getattr(self, axis) > 1}
            for rank in range(self.world_size)
        ]
