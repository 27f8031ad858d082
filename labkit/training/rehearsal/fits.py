"""Models that an experiment cannot train as they are: what can be told by looking at them, without a pass.

Each rule gives one sentence with what to change (issue 11, A15, B 05 to 07, 12, 14, 24).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from labkit.experiment import Experiment
from labkit.experiment.fault import named
from labkit.experiment.registry import registry
from labkit.quantization.linear import chosen
from labkit.sparsity.layers import prunable

_HARMLESS = "nn.BatchNorm (each rank then sees its own samples) or nn.GroupNorm"


def unfinished(model: nn.Module) -> str | None:
    """What has no shape yet: lazy layers, or tensors on the device `meta`."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            return (
                f"{name} has no shape yet (a lazy layer): call the model once on a sample in the function that makes "
                "the task, e.g. model(x[:2])"
            )
        if tensor.is_meta:
            return f"{name} lies on the device meta and holds no numbers: give it some before the task is returned"
    return None


def misfits(experiment: Experiment, model: nn.Module) -> Iterator[str]:
    """Why this model cannot be trained as the experiment asks, one sentence for each reason."""
    parameters = dict(model.named_parameters())
    trained = {name: one for name, one in parameters.items() if one.requires_grad}
    if not trained:
        frozen = f"all {len(parameters)} parameters are frozen" if parameters else "it has no parameters"
        yield f"the model has nothing to train: {frozen} (set requires_grad of some)"
        return
    for name, one in trained.items():
        if any(size > 1 and not step for size, step in zip(one.shape, one.stride(), strict=True)):
            yield f"{name} stores several numbers in one place (expand): make it a tensor of its own with clone()"
            return
    yield from _normalization(experiment, model)
    yield from _sharded(experiment, parameters, trained)
    yield from _copied(experiment, model)
    yield from _converted(experiment, model)
    yield from _complex(experiment, model, trained)


def _normalization(experiment: Experiment, model: nn.Module) -> Iterator[str]:
    if experiment.launch.device == "cuda" or experiment.layout.world_size == 1 or experiment.launch.isolated:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            yield f"{name or 'the model'} is a SyncBatchNorm, which works on GPUs only: use {_HARMLESS}"
            return


def _sharded(
    experiment: Experiment, parameters: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]
) -> Iterator[str]:
    layout = experiment.layout
    if layout.dp_shard == 1 or layout.zero_stage != 3:
        return
    for name, one in parameters.items():
        if not one.dim():
            yield (
                f"{name} is a single number without a dimension, which ZeRO 3 cannot shard: give it the shape (1,), "
                "or set layout.zero_stage to 1 or 2"
            )
            return
        if not one.numel():
            yield (
                f"{name} is empty (shape {list(one.shape)}), which ZeRO 3 cannot shard: leave it out, "
                "or set layout.zero_stage to 1 or 2"
            )
            return
        if not (one.is_floating_point() or one.is_complex()):
            kind = str(one.dtype).removeprefix("torch.")
            yield f"{name} is a parameter of {kind}, which ZeRO 3 cannot shard: make it a buffer (register_buffer)"
            return
    kinds = {one.dtype: name for name, one in trained.items()}
    if len(kinds) > 1:
        (first, here), (second, there), *_ = ((str(kind).removeprefix("torch."), name) for kind, name in kinds.items())
        yield (
            f"{here} is {first} and {there} is {second}: ZeRO 3 shards parameters of one type together, "
            "so set layout.zero_stage to 1 or 2"
        )


def _complex(experiment: Experiment, model: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[str]:
    """What knows real numbers only: it would drop the imaginary part, or fail."""
    names = [name for name, one in trained.items() if one.is_complex()]
    if not names:
        return
    compression, quantization = experiment.gradients.compression.method, experiment.quantization
    if registry("gradients.compression")[compression].load().lossy:
        yield f"{names[0]} is complex, and {compression} compresses real gradients only (gradients.compression.method)"
    if experiment.optimizer.state_bits != 32:
        yield f"{names[0]} is complex, and moments of 8 bits are real: set optimizer.state_bits to 32"
    if experiment.layout.dp_shard > 1 and experiment.layout.zero_stage == 3:
        yield f"{names[0]} is complex, which ZeRO 3 cannot shard: set layout.zero_stage to 1 or 2"
    layers = {f"{name}.weight" for name, _ in chosen(model, quantization.head)} & set(names)
    narrows = quantization.qat != "none" or quantization.after_training != "none"
    if layers and (narrows or quantization.training in ("int8", "int8_weights", "bitnet", "fp8")):
        yield f"{min(layers)} is complex, and narrow formats of layers are real: set quantization to full precision"
    if experiment.sparsity.method != "none" and (hit := sorted(set(prunable(model, True)) & set(names))):
        yield f"{hit[0]} is complex, and sparsity chooses among real weights only (sparsity.method)"


def copies(experiment: Experiment) -> str | None:
    """Which part of the experiment works with a copy of the model; None if nothing does."""
    quantization, sparsity = experiment.quantization, experiment.sparsity
    if experiment.gradients.update.method == "parameter_server":
        return "gradients.update.method=parameter_server"
    if quantization.after_training != "none":
        return f"quantization.after_training={quantization.after_training}"
    if quantization.qat != "none":
        return f"quantization.qat={quantization.qat}"
    if quantization.training in ("int8", "int8_weights", "bitnet", "fp8"):
        return f"quantization.training={quantization.training}"
    return "sparsity.export" if sparsity.export else None


def _copied(experiment: Experiment, model: nn.Module) -> Iterator[str]:
    setting = copies(experiment)
    if setting is None:
        return
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if type(hook).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"):
                old = type(hook).__module__.rpartition(".")[2]
                yield (
                    f"{name or 'the model'} has the old torch.nn.utils.{old}, which {setting} cannot work with: "
                    f"use torch.nn.utils.parametrizations.{old}"
                )
                return
    try:
        copy.deepcopy(model)
    except Exception as error:
        yield f"the model cannot be copied, which {setting} needs: {named(error)}"


def _converted(experiment: Experiment, model: nn.Module) -> Iterator[str]:
    quantization = experiment.quantization
    if quantization.after_training == "none" or chosen(model, quantization.head):
        return
    hidden = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    rest = "; layers with a parametrization (weight_norm) stay as they are" if len(hidden) > 1 else ""
    yield (
        f"quantization.after_training={quantization.after_training} finds no linear layer to convert beside the last "
        f"one (quantization.head){rest}"
    )


def sparse_gradients(experiment: Experiment, names: list[str]) -> str | None:
    """Why gradients that hold some rows only cannot be used here; None where they can, or where there are none."""
    layout = experiment.layout
    laid_out = layout.world_size > layout.dp_replicate and (layout.dp_shard == 1 or layout.zero_stage == 1)
    if not names or laid_out:
        return None
    return (
        f"{names[0]} has sparse gradients (sparse=True), which neither {experiment.optimizer.name} nor the exchange of "
        "gradients takes here: leave sparse=True out, the numbers stay the same"
    )


def unsaved(state: dict[str, object]) -> str | None:
    """What of a model's state (`state_dict()`) cannot go into a checkpoint."""
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            return f"{name} of the model's state is a {type(value).__name__}: a checkpoint holds tensors only"
        if value.layout is not torch.strided or value.is_quantized or value.dtype not in _savable():
            kind = f"{value.layout}, {value.dtype}".replace("torch.", "")
            return f"{name} of the model's state ({kind}) is a kind of tensor that a checkpoint cannot hold"
    return None


def _savable() -> set[torch.dtype]:
    from safetensors.torch import _TYPES

    known = {kind for kind in _TYPES.values() if isinstance(kind, torch.dtype)}
    return known | {torch.complex128}  # as pairs of real numbers (labkit.parallel.state)
