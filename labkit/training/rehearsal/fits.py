"""Models that an experiment cannot train as they are, as far as inspection can tell without a pass.

Each rule gives a sentence that says what to change (issue 11, A15, B 05 to 07, 12, 14, 24).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from labkit.experiment import Experiment
from labkit.experiment.fault import describe_error
from labkit.experiment.registry import registry
from labkit.quantization.linear import chosen
from labkit.sparsity.layers import prunable

_HARMLESS = "nn.BatchNorm (each rank then sees its own samples) or nn.GroupNorm"


def unfinished(model: nn.Module) -> str | None:
    """Return a sentence on the first tensor without shape (lazy layer) or without values (device `meta`), or None."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            return (
                f"{name} has no shape yet (a lazy layer): call the model once on a few samples in the function that "
                "creates the task, e.g. model(x[:2])"
            )
        if tensor.is_meta:
            return f"{name} is on the meta device and has no values: give it values before you return the task"
    return None


def misfits(experiment: Experiment, model: nn.Module) -> Iterator[str]:
    """Yield a sentence for each reason why this model cannot be trained as the experiment asks."""
    parameters = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trained:
        frozen = f"all {len(parameters)} parameters are frozen" if parameters else "it has no parameters"
        yield f"the model has nothing to train: {frozen} (set requires_grad=True for some)"
        return
    for name, parameter in trained.items():
        if any(size > 1 and not step for size, step in zip(parameter.shape, parameter.stride(), strict=True)):
            yield f"{name} stores several elements at one address (expand): make it an independent tensor with clone()"
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
    for name, parameter in parameters.items():
        if not parameter.dim():
            yield (
                f"{name} is a scalar (no dimensions), which ZeRO 3 cannot shard: give it the shape (1,), "
                "or set layout.zero_stage to 1 or 2"
            )
            return
        if not parameter.numel():
            yield (
                f"{name} is empty (shape {list(parameter.shape)}), which ZeRO 3 cannot shard: leave it out, "
                "or set layout.zero_stage to 1 or 2"
            )
            return
        if not (parameter.is_floating_point() or parameter.is_complex()):
            kind = str(parameter.dtype).removeprefix("torch.")
            yield f"{name} is a parameter of {kind}, which ZeRO 3 cannot shard: make it a buffer (register_buffer)"
            return
    kinds = {parameter.dtype: name for name, parameter in trained.items()}
    if len(kinds) > 1:
        (dtype, name), (other_dtype, other_name), *_ = (
            (str(kind).removeprefix("torch."), name) for kind, name in kinds.items()
        )
        yield (
            f"{name} is {dtype} and {other_name} is {other_dtype}: ZeRO 3 shards parameters of one dtype together, "
            "so set layout.zero_stage to 1 or 2"
        )


def _complex(experiment: Experiment, model: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[str]:
    """Yield a sentence for each setting that handles real numbers only: it would drop the imaginary part, or fail."""
    names = [name for name, parameter in trained.items() if parameter.is_complex()]
    if not names:
        return
    compression, quantization = experiment.gradients.compression.method, experiment.quantization
    if registry("gradients.compression")[compression].load().lossy:
        yield f"{names[0]} is complex, and {compression} compresses real gradients only (gradients.compression.method)"
    if experiment.optimizer.state_bits != 32:
        yield f"{names[0]} is complex, and 8-bit moments are real: set optimizer.state_bits to 32"
    if experiment.layout.dp_shard > 1 and experiment.layout.zero_stage == 3:
        yield f"{names[0]} is complex, which ZeRO 3 cannot shard: set layout.zero_stage to 1 or 2"
    layers = {f"{name}.weight" for name, _ in chosen(model, quantization.head)} & set(names)
    converts = quantization.qat != "none" or quantization.after_training != "none"
    if layers and (converts or _replaces_layers(experiment)):
        yield f"{min(layers)} is complex, and low-precision layers are real: set quantization to full precision"
    if experiment.sparsity.method != "none" and (complex_names := sorted(set(prunable(model, True)) & set(names))):
        yield f"{complex_names[0]} is complex, and sparsity chooses among real weights only (sparsity.method)"


def _replaces_layers(experiment: Experiment) -> bool:
    """Return whether training computes in layers other than those of the model."""
    return bool(registry("quantization.training")[experiment.quantization.training].load().layers_from)


def copies(experiment: Experiment) -> str | None:
    """Return the first setting of the experiment that needs a copy of the model; None if there is none."""
    quantization, sparsity = experiment.quantization, experiment.sparsity
    if experiment.gradients.update.method == "parameter_server":
        return "gradients.update.method=parameter_server"
    if quantization.after_training != "none":
        return f"quantization.after_training={quantization.after_training}"
    if quantization.qat != "none":
        return f"quantization.qat={quantization.qat}"
    if _replaces_layers(experiment):
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
                    f"{name or 'the model'} uses the old torch.nn.utils.{old}, which {setting} does not support: "
                    f"use torch.nn.utils.parametrizations.{old}"
                )
                return
    try:
        copy.deepcopy(model)
    except Exception as error:
        yield f"the model cannot be copied, which {setting} needs: {describe_error(error)}"


def _converted(experiment: Experiment, model: nn.Module) -> Iterator[str]:
    quantization = experiment.quantization
    if quantization.after_training == "none" or chosen(model, quantization.head):
        return
    hidden = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    rest = "; layers with a parametrization (weight_norm) stay as they are" if len(hidden) > 1 else ""
    yield (
        f"quantization.after_training={quantization.after_training} finds no linear layer to convert except the last "
        f"one (quantization.head){rest}"
    )


def sparse_gradients(experiment: Experiment, names: list[str]) -> str | None:
    """Return why the sparse gradients of `names` cannot be used here; None if they can, or if `names` is empty."""
    layout = experiment.layout
    supported = layout.world_size > layout.dp_replicate and (layout.dp_shard == 1 or layout.zero_stage == 1)
    if not names or supported:
        return None
    return (
        f"{names[0]} has sparse gradients (sparse=True), which neither {experiment.optimizer.name} nor the reduction "
        "of gradients supports here: remove sparse=True; the results stay the same"
    )


def unsaved(state: dict[str, object]) -> str | None:
    """Return a sentence about the first entry of a model's `state_dict()` that a checkpoint cannot store, or None."""
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            return f"{name} of the model's state is a {type(value).__name__}: a checkpoint stores only tensors"
        if value.layout is not torch.strided or value.is_quantized or value.dtype not in _savable():
            kind = f"{value.layout}, {value.dtype}".replace("torch.", "")
            return f"{name} of the model's state ({kind}) is a kind of tensor that a checkpoint cannot store"
    return None


def _savable() -> set[torch.dtype]:
    from safetensors.torch import _TYPES

    dtypes = {dtype for dtype in _TYPES.values() if isinstance(dtype, torch.dtype)}
    return dtypes | {torch.complex128}  # stored as pairs of real numbers (labkit.parallel.state)
