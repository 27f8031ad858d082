"""Checkpoints: safetensors and JSON, complete or absent, independent of the layout.

Accelerate's `save_state` pickles optimizer and random state, and nothing in a run directory may be a pickle. So the
state dicts come from torch's `distributed.checkpoint.state_dict`, where optimizer state is keyed by parameter name
(not by position), and the tensors go to safetensors. Random state is not saved: everything random in a step follows
from seed, step and rank.

    step-00000100/
        model.safetensors        weights by name, loadable anywhere
        optimizer.safetensors    e.g. `state.blocks.head.weight.exp_avg`
        checkpoint.json          step, experiment, optimizer numbers; written last
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from labkit.experiment import Experiment
from labkit.experiment.run_directory import RunDirectory, read_json, write_json

FORMAT = 1
_SAVE = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
# torch (seen with 2.13) cannot load what it has flattened when the state is full: it is nested again here.
_LOAD = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(
    directory: RunDirectory,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    experiment: Experiment,
    writes: bool,
) -> Path:
    """Write the state of a whole model after `step` updates; the rank that `writes` does. Returns the folder."""
    weights = get_model_state_dict(model, options=_SAVE)
    state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_SAVE))
    if not writes:
        return directory.checkpoint(step)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    begin(directory, step)
    write_part(directory, step, weights, tensors)
    return finish(directory, step, experiment, numbers)


def begin(directory: RunDirectory, step: int) -> None:
    """Make the folder in which the parts come together."""
    partial = _partial(directory, step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)


def write_part(
    directory: RunDirectory, step: int, weights: dict[str, Any], tensors: dict[str, Tensor], number: int = 0
) -> None:
    """Write one part: everything, or what the stages of pipeline rank `number` hold."""
    suffix = f"-{number}" if number else ""
    partial = _partial(directory, step)
    save_file(_unshared(weights), partial / f"model{suffix}.safetensors")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial / f"optimizer{suffix}.safetensors")


def finish(directory: RunDirectory, step: int, experiment: Experiment, numbers: dict[str, Any]) -> Path:
    """All parts are there: the checkpoint becomes visible."""
    final, partial = directory.checkpoint(step), _partial(directory, step)
    content = {"format": FORMAT, "step": step, "experiment": experiment.to_dict(), "optimizer": _plain(numbers)}
    write_json(partial / "checkpoint.json", content)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _forget_old(directory, experiment.training.keep_checkpoints)
    return final


def _partial(directory: RunDirectory, step: int) -> Path:
    final = directory.checkpoint(step)
    return final.with_name(f".{final.name}.partial")


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds, whole, whatever layout wrote it."""

    step: int
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def read(folder: Path) -> Stored:
    """Read all parts. ValueError if it is no checkpoint of ours or damaged."""
    content = read_json(folder / "checkpoint.json")
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("step"), int):
        raise ValueError(f"{folder} is not a checkpoint of this version of labkit")
    numbers = content.get("optimizer")
    if not isinstance(numbers, dict):
        raise ValueError(f"the checkpoint {folder.name} is damaged: its numbers cannot be read")
    weights: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    with _one_sentence(folder):
        for kind, found in (("model", weights), ("optimizer", tensors)):
            first = folder / f"{kind}.safetensors"  # must be there; the others are those of a pipeline's ranks
            for path in {first: None} | dict.fromkeys(sorted(folder.glob(f"{kind}-*.safetensors"))):
                found |= load_file(path)
    return Stored(int(content["step"]), weights, tensors, numbers)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore a whole model and its optimizer; returns the number of updates done. ValueError if it does not fit."""
    stored = read(folder)
    with _one_sentence(folder):
        state = _nested(model, optimizer, stored.tensors | stored.numbers)
        set_model_state_dict(model, {**_with_shared(model, stored.weights)}, options=_LOAD)
        if stored.tensors:  # an optimizer without memory (SGD without momentum) has nothing to restore
            set_optimizer_state_dict(model, optimizer, state, options=_LOAD)
    return stored.step


@contextlib.contextmanager
def _one_sentence(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder.name} is damaged or does not fit this model: {error}") from error


def _nested(model: nn.Module, optimizer: torch.optim.Optimizer, flat: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state dict, by parameter name, from `state.NAME.KEY` and `param_groups.NAME.KEY`."""
    by_name: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for path, value in flat.items():
        kind, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        # A tuple such as Adam's betas is a list in JSON.
        by_name[kind].setdefault(name, {})[key] = tuple(value) if isinstance(value, list) else value
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    return {
        "state": by_name["state"],
        "param_groups": [
            {key: value for key, value in now.items() if key != "params"}
            | by_name["param_groups"].get(
                group[0], {}
            )  # a spread model's checkpoint has none: they are the experiment's
            | {"params": group}
            for now, group in zip(optimizer.param_groups, groups, strict=True)
        ],
    }


def _unshared(weights: dict[str, Any]) -> dict[str, Tensor]:
    """Keep the first name of each tensor: safetensors refuses those that share memory (tied embeddings)."""
    seen: set[tuple[int, int]] = set()
    kept = {}
    for name, tensor in weights.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        if place not in seen or tensor.numel() == 0:
            seen.add(place)
            kept[name] = tensor.contiguous()
    return kept


def _with_shared(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give tied tensors their second names back."""
    by_tensor: dict[int, str] = {}
    full = dict(weights)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = by_tensor.setdefault(id(parameter), name)
        if name not in full and first in weights:
            full[name] = weights[first]
    return full


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()}


def _forget_old(directory: RunDirectory, keep: int) -> None:
    folders = sorted(path for path in directory.checkpoints.glob("step-*") if (path / "checkpoint.json").exists())
    for folder in folders[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
