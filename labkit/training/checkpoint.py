"""Checkpoints: safetensors and JSON, complete or absent, independent of the layout.

Accelerate's `save_state` pickles optimizer and random state, and nothing in a run directory may be a pickle. So the
whole state is gathered by name (labkit.parallel.state) and goes to safetensors. Random state is not saved: everything
random in a step follows from seed, step and rank.

    step-00000100/
        model.safetensors        weights by name, loadable anywhere
        optimizer.safetensors    e.g. `state.blocks.head.weight.exp_avg`
        model-1.safetensors …    the same of the other ranks of a pipeline, each with its own stages
        update.safetensors       what the update rule keeps, if it keeps anything
        checkpoint.json          step and experiment; written last
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory, read_json, write_json
from labkit.parallel.state import State

FORMAT = 1


def save(
    directory: RunDirectory,
    step: int,
    experiment: Experiment,
    weights: State,
    moments: State,
    part: int | None = 0,
    leads: bool = True,
    meet: Callable[[], None] = lambda: None,
    more: State | None = None,
) -> Path:
    """Write the state after `step` updates and return the folder.

    `part` is the number of this rank's part, None for a rank that writes nothing. Where there are several parts, all
    ranks `meet` before and after writing; the one that `leads` makes the folder and completes it, with `more` in it.
    """
    final = directory.checkpoint(step)
    partial = final.with_name(f".{final.name}.partial")
    if leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
    meet()
    if part is not None:
        suffix = f"-{part}" if part else ""
        save_file(weights, partial / f"model{suffix}.safetensors")
        save_file(moments, partial / f"optimizer{suffix}.safetensors")
    meet()
    if leads:
        if more:
            save_file(more, partial / "update.safetensors")
        content = {"format": FORMAT, "step": step, "experiment": experiment.to_dict()}
        write_json(partial / "checkpoint.json", content)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _forget_old(directory, experiment.training.keep_checkpoints)
    return final


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, whole, whatever layout wrote it."""

    step: int
    """Updates done."""
    weights: State
    moments: State
    more: State
    """What the update rule keeps; equal on all ranks."""


def read(folder: Path) -> Stored:
    """Read all parts. ValueError if it is no checkpoint of ours or damaged."""
    content = read_json(folder / "checkpoint.json")
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("step"), int):
        raise ValueError(f"{folder} is not a checkpoint of this version of labkit")
    if not isinstance(content.get("experiment"), dict):
        raise ValueError(f"the checkpoint {folder.name} is damaged: its experiment cannot be read")
    with fitting(folder):
        kept = folder / "update.safetensors"
        more = load_file(kept) if kept.exists() else {}
        return Stored(int(content["step"]), _parts(folder, "model"), _parts(folder, "optimizer"), more)


def _parts(folder: Path, kind: str) -> State:
    """The first part, which must be there, and those of the other ranks of a pipeline."""
    found = load_file(folder / f"{kind}.safetensors")
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        found |= load_file(path)
    return found


@contextlib.contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Say in one sentence (ValueError) that what is in `folder` cannot be used."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder.name} is damaged or does not fit this model: {error}") from error


def _forget_old(directory: RunDirectory, keep: int) -> None:
    folders = sorted(path for path in directory.checkpoints.glob("step-*") if (path / "checkpoint.json").exists())
    for folder in folders[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
