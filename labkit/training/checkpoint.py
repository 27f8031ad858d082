"""Checkpoints: safetensors and JSON, complete or absent, independent of the layout.

Accelerate's `save_state` pickles optimizer and random state, and nothing in a run directory may be a pickle. So the
full state is gathered by name (labkit.parallel.state) and stored as safetensors. Random state is not saved: everything
random in a step follows from seed, step and rank.

State that only one rank has (error-feedback buffers, weights between two averages) is stored in a file of that rank. It
is used if the run resumes on the same ranks; on other ranks it is ignored, and the run says so (launch/resuming.py).

The files of a checkpoint, and how they are published and verified: labkit.experiment.checkpoint_files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from labkit.experiment import Experiment, checkpoint_files, safe_files
from labkit.experiment.checkpoint_files import FileChecksum, Manifest
from labkit.experiment.run_directory import RunDirectory, write_json
from labkit.experiment.tensor_files import load_file, save_file
from labkit.parallel.state import State


@dataclass(frozen=True)
class Saved:
    """What one rank contributes to a checkpoint."""

    weights: State
    moments: State
    part: int | None = 0
    """Index of this rank's part of weights and moments; None if another rank writes its stages."""
    shared: State = field(default_factory=dict)
    """State of update rule and sparsity method, equal on all ranks."""
    own: State | None = None
    """State that only this rank has; None on all ranks if no rank has any."""


def save(
    directory: RunDirectory,
    step: int,
    experiment: Experiment,
    saved: Saved,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
    unscheduled: bool = False,
    code: str = "",
) -> Path:
    """Write the state after `step` optimizer steps and return the folder.

    If several ranks write, all of them call `barrier` before and after; rank 0 creates and completes the folder. For
    `unscheduled` and `code` see Manifest. When this returns on rank 0, the checkpoint is on the disk; only then are
    older ones removed.
    """
    final = directory.checkpoint(step)
    partial = final.with_name(f".{final.name}.partial")
    is_first = rank == 0
    if is_first:
        safe_files.remove_folder(partial)
        partial.mkdir(parents=True, mode=0o700)
    barrier()
    files: dict[str, State] = {}
    if saved.part is not None:
        suffix = f"-{saved.part}" if saved.part else ""
        files |= {f"model{suffix}.safetensors": saved.weights, f"optimizer{suffix}.safetensors": saved.moments}
    if saved.own is not None:
        files[checkpoint_files.rank_file(rank)] = saved.own
    if is_first and saved.shared:
        files["update.safetensors"] = saved.shared
    if files:
        checkpoint_files.write_checksums(partial, rank, _write(partial, files))
    barrier()
    if is_first:
        sums = checkpoint_files.collect_checksums(partial)
        content = checkpoint_files.manifest_content(step, experiment.to_dict(), sums, unscheduled, code)
        write_json(partial / checkpoint_files.MANIFEST, content, durable=True)
        checkpoint_files.publish(partial, final)
        _remove_old(directory, experiment.training.keep_checkpoints)
    return final


def _write(folder: Path, files: dict[str, State]) -> dict[str, FileChecksum]:
    sums = {}
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        sums[name] = checkpoint_files.sync_and_hash(folder / name)
    return sums


@dataclass(frozen=True)
class Stored:
    """Full contents of a checkpoint, whatever layout wrote it."""

    contents: Manifest
    weights: State
    moments: State
    shared: State
    """State of update rule and sparsity method, equal on all ranks."""
    own: State | None
    """State that only this rank has; None if it has none."""

    @property
    def step(self) -> int:
        """Number of optimizer steps before the checkpoint."""
        return self.contents.step


def read(folder: Path, rank: int = 0) -> Stored:
    """Verify the checksums of a checkpoint and return its contents, with the own state of `rank`.

    Raises ValueError (one sentence) if the folder is not a labkit checkpoint or is damaged.
    """
    contents = checkpoint_files.read_manifest(folder)
    required = [*contents.parts("model"), *contents.parts("optimizer")]
    optional = [name for name in ("update.safetensors", checkpoint_files.rank_file(rank)) if name in contents.files]
    checkpoint_files.verify(folder, contents, [*required, *optional])
    with as_checkpoint_error(folder):
        extra = {name: load_file(folder / name) for name in optional}
        weights, moments = (_parts(folder, contents, kind) for kind in ("model", "optimizer"))
    own = extra.get(checkpoint_files.rank_file(rank))
    return Stored(contents, weights, moments, extra.get("update.safetensors", {}), own)


def _parts(folder: Path, contents: Manifest, kind: str) -> State:
    """Return the parts of all pipeline ranks as one state; `kind` is `model` or `optimizer`."""
    state = State()
    for name in contents.parts(kind):
        state |= load_file(folder / name)
    return state


@contextlib.contextmanager
def as_checkpoint_error(folder: Path) -> Iterator[None]:
    """Raise errors of the body as a ValueError that says in one sentence that the checkpoint cannot be used."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder.name} is damaged or does not fit this model: {error}") from error


def _remove_old(directory: RunDirectory, keep: int) -> None:
    for step in directory.checkpoint_steps()[:-keep]:
        safe_files.remove_folder(directory.checkpoint(step))
