"""The profiles of a run: where the files are, and which operations took most of the profiled step, rank by rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.experiment import safe_files
from labkit.experiment.chrome_trace import MAX_PACKED_BYTES, Operation, operations, spans, unpack
from labkit.experiment.run_directory import RunDirectory

if TYPE_CHECKING:
    from labkit.runs.data import RunData

HOW_TO_OPEN = "open them in https://ui.perfetto.dev or, unpacked, in chrome://tracing"
"""What to do with the files, which need no account and stay on the own machine."""
LONGEST = 10
"""Number of operations in the table of a rank."""


@dataclass(frozen=True, kw_only=True)
class OperationRow:
    """All calls of one operation in the profiled step of one rank."""

    rank: int
    operation: str
    """Name of the operation, or of the kernel on a GPU; untrusted text."""
    device: str
    """`CPU`, or `GPU` if the rank has a GPU: then kernels are listed, not the operations that launch them."""
    calls: int
    seconds: float
    """Time of these calls, without operations inside them (s)."""
    share: float
    """Fraction of the time of all operations on that device."""

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a dict of JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class RunProfile:
    """The profiles of a run."""

    step: int | None
    """The profiled step, counted from 1; None if no rank has reported it."""
    paths: list[Path]
    """Files of the ranks that have one: chrome traces, compressed with gzip."""
    rows: list[OperationRow]
    """The operations that took most time, LONGEST per rank, the longest first."""
    notes: list[str]
    """Why a rank has no file, or why its file cannot be read, one sentence each."""


def read_profile(data: RunData) -> RunProfile:
    """Return the profiles of a run, whose files are untrusted."""
    directory, notes = data.directory, profile_notes(data)
    paths, rows = profile_paths(data), []
    for rank in range(data.world_size):
        if directory.profile(rank) in paths:
            try:
                rows += _rows(rank, directory.profile(rank))
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                notes.append(f"the profile of rank {rank} cannot be read: {reason}")
    return RunProfile(profiled_step(data), paths, rows, notes)


def profile_paths(data: RunData) -> list[Path]:
    """Return the profiles that exist, in the order of the ranks; links do not count."""
    directory: RunDirectory = data.directory
    if not safe_files.is_folder(directory.profiles):
        return []
    paths = map(directory.profile, range(data.world_size))
    return [path for path in paths if safe_files.is_regular(path)]


def profiled_step(data: RunData) -> int | None:
    """Return the step, counted from 1, that the first rank with a profile has recorded; None if there is none."""
    return next((profile["step"] for _, profile in sorted(data.profiles.items())), None)


def profile_notes(data: RunData) -> list[str]:
    """Return why ranks have no profile, one sentence each; equal reasons only once, with all of their ranks."""
    ranks_by_reason: dict[str, list[int]] = {}
    for rank, profile in sorted(data.profiles.items()):
        if profile["note"]:
            ranks_by_reason.setdefault(profile["note"], []).append(rank)
    return [f"{_of_ranks(ranks)}: {reason}" for reason, ranks in ranks_by_reason.items()]


def _of_ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _rows(rank: int, path: Path) -> list[OperationRow]:
    """Return the longest operations of a rank; raise OSError or ValueError with a reason if its file is no profile."""
    measured = operations(spans(unpack(safe_files.read_bytes(path, MAX_PACKED_BYTES))))
    on_gpu = any(operation.on_gpu for operation in measured)
    shown = [operation for operation in measured if operation.on_gpu == on_gpu]
    total = sum(operation.seconds for operation in shown)
    return [_row(rank, operation, total) for operation in shown[:LONGEST]]


def _row(rank: int, operation: Operation, total: float) -> OperationRow:
    return OperationRow(
        rank=rank,
        operation=operation.name,
        device="GPU" if operation.on_gpu else "CPU",
        calls=operation.calls,
        seconds=operation.seconds,
        share=operation.seconds / total if total else 0.0,
    )


def profile_text(profile: RunProfile) -> Iterable[str]:
    """Yield the lines of a terminal about the profiles of a run; names may still need escapes."""
    if profile.paths:
        yield f"Step {profile.step} as torch.profiler recorded it; {HOW_TO_OPEN}:"
        yield from (f"  {path}" for path in profile.paths)
    for rank in sorted({row.rank for row in profile.rows}):
        rows = [row for row in profile.rows if row.rank == rank]
        yield ""
        yield f"rank {rank}: the operations on its {rows[0].device} that took most time, without those inside them"
        yield f"  {'ms':>10}  {'share':>5}  {'calls':>6}  operation"
        for row in rows:
            yield f"  {1e3 * row.seconds:10.3f}  {row.share:5.0%}  {row.calls:6}  {row.operation}"
    yield from (f"note: {note}" for note in profile.notes)
