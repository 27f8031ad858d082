"""Checkpoints: safetensors and JSON, complete or absent, independent of the layout.

Accelerate's `save_state` pickles optimizer and random state, and nothing in a run directory may be a pickle. So the
whole state is gathered by name (labkit.parallel.state) and goes to safetensors. Random state is not saved: everything
random in a step follows from seed, step and rank.

What only one rank has (what its compressor has not sent yet, weights between two averages) goes to a file of that rank.
It is used when the run goes on with the same ranks; on others it is left out, and the run says so (launch/resume.py).

Which files there are, and how they become visible and are believed: labkit.experiment.checkpoint_files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from labkit.experiment import Experiment, checkpoint_files, safe_files
from labkit.experiment.checkpoint_files import Contents, Sum
from labkit.experiment.run_directory import RunDirectory, write_json
from labkit.experiment.tensor_files import load_file, save_file
from labkit.parallel.state import State


@dataclass(frozen=True)
class Saved:
    """What one rank brings to a checkpoint."""

    weights: State
    moments: State
    part: int | None = 0
    """Number of this rank's part of weights and moments; None for a rank whose stages another one writes."""
    more: State = field(default_factory=dict)
    """What the update rule and the sparsity keep, the same on all ranks."""
    own: State | None = None
    """What this rank keeps for itself; None on all ranks where no rank does."""


def save(
    directory: RunDirectory,
    step: int,
    experiment: Experiment,
    saved: Saved,
    rank: int = 0,
    meet: Callable[[], None] = lambda: None,
    unscheduled: bool = False,
    code: str = "",
) -> Path:
    """Write the state after `step` updates and return the folder.

    Where several ranks write, all `meet` before and after; rank 0 makes the folder and completes it. `unscheduled` and
    `code`: see Contents. When this returns on rank 0, the checkpoint is on the disk, and only then are older ones
    removed.
    """
    final = directory.checkpoint(step)
    partial = final.with_name(f".{final.name}.partial")
    leads = rank == 0
    if leads:
        safe_files.remove_folder(partial)
        partial.mkdir(parents=True, mode=0o700)
    meet()
    files: dict[str, State] = {}
    if saved.part is not None:
        suffix = f"-{saved.part}" if saved.part else ""
        files |= {f"model{suffix}.safetensors": saved.weights, f"optimizer{suffix}.safetensors": saved.moments}
    if saved.own is not None:
        files[checkpoint_files.of_rank(rank)] = saved.own
    if leads and saved.more:
        files["update.safetensors"] = saved.more
    if files:
        checkpoint_files.note_sums(partial, rank, _write(partial, files))
    meet()
    if leads:
        sums = checkpoint_files.collect_sums(partial)
        content = checkpoint_files.listed(step, experiment.to_dict(), sums, unscheduled, code)
        write_json(partial / checkpoint_files.LIST, content, durable=True)
        checkpoint_files.publish(partial, final)
        _forget_old(directory, experiment.training.keep_checkpoints)
    return final


def _write(folder: Path, files: dict[str, State]) -> dict[str, Sum]:
    sums = {}
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        sums[name] = checkpoint_files.seal(folder / name)
    return sums


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, whole, whatever layout wrote it."""

    contents: Contents
    weights: State
    moments: State
    more: State
    """What the update rule and the sparsity keep; equal on all ranks."""
    own: State | None
    """What this rank had kept for itself; None if it had kept nothing."""

    @property
    def step(self) -> int:
        """Updates done."""
        return self.contents.step


def read(folder: Path, rank: int = 0) -> Stored:
    """Read all parts, and what `rank` kept for itself, once their checksums have been compared with the list.

    ValueError (one sentence) if it is no checkpoint of ours or damaged.
    """
    contents = checkpoint_files.read_list(folder)
    wanted = [*contents.parts("model"), *contents.parts("optimizer")]
    optional = [name for name in ("update.safetensors", checkpoint_files.of_rank(rank)) if name in contents.files]
    checkpoint_files.verify(folder, contents, [*wanted, *optional])
    with fitting(folder):
        kept = {name: load_file(folder / name) for name in optional}
        weights, moments = (_parts(folder, contents, kind) for kind in ("model", "optimizer"))
    own = kept.get(checkpoint_files.of_rank(rank))
    return Stored(contents, weights, moments, kept.get("update.safetensors", {}), own)


def _parts(folder: Path, contents: Contents, kind: str) -> State:
    """The first part and those of the other ranks of a pipeline, together."""
    together = State()
    for name in contents.parts(kind):
        together |= load_file(folder / name)
    return together


@contextlib.contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Say in one sentence (ValueError) that what is in `folder` cannot be used."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder.name} is damaged or does not fit this model: {error}") from error


def _forget_old(directory: RunDirectory, keep: int) -> None:
    for step in directory.checkpoint_steps()[:-keep]:
        safe_files.remove_folder(directory.checkpoint(step))
