"""One row of a comparison of runs: what `compare` returns for each run, and what tables and figures read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ComparisonRow(Mapping[str, Any]):
    """One run in a comparison. `row["speedup"]` is `row.speedup`; `as_dict()` makes a dict of it, e.g. for JSON."""

    run_id: str
    """Id of the run."""
    title: str
    """Title of the run; its id if it has none."""
    workload: str
    """Workload of the run: `vision`, `language`, `driving` or `custom`."""
    layout: str
    """Layout in short form, such as `dp2·tp2`."""
    method: str
    """Compressor, update rule and other methods in short form; `plain` if there are none."""
    world_size: int
    """Number of ranks."""
    device: str
    """Device as in the experiment: `cpu` or `cuda`."""
    state: str
    """State of the run: `finished`, `stopped` or `failed`, or the state of a run that has not ended."""
    global_batch: int
    """Samples per optimizer step over all ranks."""
    steps: int
    """Optimizer steps of this run that all ranks have reported, without those before a resume."""
    metric: str | None
    """Key of the main metric; null if the task has not reported it."""
    final: float | None
    """Main metric of the last evaluation; null before the first one and for runs that measure the ceiling."""
    loss: float | None
    """Held-out loss of the last evaluation; null before the first one and for runs that measure the ceiling."""
    samples_per_second: float | None
    """Median throughput over all ranks after the warm-up."""
    model_flops_per_second: float | None
    """Median model FLOPs per second over all ranks: 3 × the products of one forward pass, per sample; null if they are
    not known."""
    mfu: float | None
    """Model FLOPs per second divided by the peak rate of the GPUs; null on CPUs and if that is not known."""
    step_seconds: float | None
    """Median time of a step after the warm-up (s)."""
    warmup_steps: int | None
    """Number of first steps that the medians leave out."""
    speedup: float | None
    """Throughput divided by that of the baseline; null if no speed-up can be claimed (`notes` gives the reason)."""
    speedup_low: float | None
    """Lower end of the 95 % interval of the speed-up (moving-block bootstrap)."""
    speedup_high: float | None
    """Upper end of that interval."""
    efficiency: float | None
    """Speed-up divided by the ratio of ranks."""
    ceiling: float | None
    """Speed-up of as many independent copies on this machine, the most that it can give; null if not measured."""
    baseline_run_id: str | None
    """The run to which the speed-up refers."""
    is_baseline: bool
    """Whether this run is the baseline, or can be one."""
    is_ceiling: bool
    """Whether this run measures the ceiling: independent copies that run at the same time (`launch.isolated`)."""
    notes: list[str]
    """Why a figure is missing or must be read with care, one sentence each."""

    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a dict of JSON values."""
        return asdict(self)
