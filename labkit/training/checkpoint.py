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

import shutil
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
    """Write the state after `step` updates. All ranks call it; the one that `writes` does. Returns the folder."""
    weights = get_model_state_dict(model, options=_SAVE)
    state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_SAVE))
    final = directory.checkpoint(step)
    if not writes:
        return final
    tensors = {name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)
    save_file(_unshared(weights), partial / "model.safetensors")
    save_file(tensors, partial / "optimizer.safetensors")
    content = {"format": FORMAT, "step": step, "experiment": experiment.to_dict(), "optimizer": _plain(numbers)}
    write_json(partial / "checkpoint.json", content)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _forget_old(directory, experiment.training.keep_checkpoints)
    return final


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore model and optimizer on every rank; returns the number of updates done. ValueError if it does not fit."""
    content = read_json(folder / "checkpoint.json")
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("step"), int):
        raise ValueError(f"{folder} is not a checkpoint of this version of labkit")
    numbers = content.get("optimizer")
    try:
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
        state = _nested(model, optimizer, tensors | (numbers if isinstance(numbers, dict) else {}))
        set_model_state_dict(model, {**_with_shared(model, weights)}, options=_LOAD)
        if tensors:  # an optimizer without memory (SGD without momentum) has nothing to restore
            set_optimizer_state_dict(model, optimizer, state, options=_LOAD)
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder.name} is damaged or does not fit this model: {error}") from error
    return int(content["step"])


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
        "param_groups": [by_name["param_groups"][group[0]] | {"params": group} for group in groups],
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
