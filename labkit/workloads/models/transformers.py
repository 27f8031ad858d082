"""A causal model of Hugging Face `transformers` in the form that the ranks train: tokens in, logits out."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from labkit.workloads import hub
from labkit.workloads.language import is_chain
from labkit.workloads.models.decoder import chain
from labkit.workloads.rules import is_path
from labkit.workloads.seed import seeded
from labkit.workloads.text import Encode

_ALWAYS = {"attn_implementation", "_attn_implementation", "experts_implementation", "dtype", "torch_dtype"}
_ALWAYS |= {"rope_scaling", "rope_theta", "is_decoder", "add_cross_attention", "name_or_path", "architectures"}
"""Fields that every type of model accepts, whatever its configuration lists."""
GROUPED = "grouped_mm"
_POSITIONS = ("max_position_embeddings", "n_positions")


class CausalModel(nn.Module):
    """Wrapper of the library's model: [N, T] int64 to logits [N, T, vocabulary], without cache or loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self._experts = getattr(config, "_experts_implementation", None) if _has_experts(config) else None
        """How the library computes the experts of a mixture; its grouped products do not support float64."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self._experts == GROUPED:
            exact = next(self.model.parameters()).dtype == torch.float64
            config: Any = self.model.config
            config._experts_implementation = "eager" if exact else GROUPED
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def causal_model(
    config: Mapping[str, Any] | None, pretrained: str, context: int, vocabulary: int, seed: int
) -> nn.Module:
    """Return the model as a chain of blocks if it is one (labkit.workloads.models.decoder), else wrapped.

    It is built from a configuration with random weights from `seed`, or loaded from a folder or hub id with its
    pretrained weights.

    Dropout is switched off unless the configuration asks for it: each rank would draw different random numbers than one
    process does, and layouts could no longer be compared. Raises ValueError in one sentence.
    """
    from transformers import AutoModelForCausalLM

    if pretrained:
        try:
            loaded = AutoModelForCausalLM.from_pretrained(pretrained, dtype="float32", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(hub.explain_load_error(pretrained, error)) from error
        _switch_off_dropout(loaded)
        _check_sizes(loaded.config, context, vocabulary)
        return _as_blocks(loaded.train(), context)
    requested = dict(config or {})
    built = _configuration(requested, context, vocabulary)
    _check_sizes(built, context, vocabulary)
    with seeded(seed):
        try:
            model = AutoModelForCausalLM.from_config(built)  # type: ignore[no-untyped-call]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"transformers cannot build {requested['model_type']!r}: {hub.first_line(error)}"
            ) from error
    if not _asks_for_dropout(requested):
        _switch_off_dropout(model)
    return _as_blocks(model.float().train(), context)


def _as_blocks(model: Any, context: int) -> nn.Module:
    """Return the model as a chain of blocks if possible, else wrapped in CausalModel."""
    _keep_float64(model)
    settings = model.config.to_dict() | {"attn_implementation": model.config._attn_implementation}
    return chain(model) if is_chain(settings, context) else CausalModel(model)


def encoder(pretrained: str) -> tuple[Encode, int]:
    """Return the tokenizer of a pretrained model as a function, and the size of its vocabulary."""
    if not is_path(pretrained):
        hub.use_cache_when_offline()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(hub.explain_load_error(pretrained, error)) from error

    def encode(text: str) -> np.ndarray[Any, Any]:
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)

    return encode, len(tokenizer)


def _configuration(requested: Mapping[str, Any], context: int, vocabulary: int) -> Any:
    """Return the library's configuration object for these fields; ValueError if it refuses them."""
    from transformers import AutoConfig

    overrides = {"vocab_size": vocabulary} | {name: value for name, value in requested.items() if name != "model_type"}
    try:
        # Token ids of the model's original vocabulary (begin, end, padding) mean nothing with bytes as tokens.
        special = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name not in requested}
        AutoConfig.for_model(requested["model_type"])
        unknown = _unknown(requested)
        built = None if unknown else AutoConfig.for_model(requested["model_type"], **special, **overrides)
    except KeyError:
        raise ValueError('the configuration of a transformers model needs a "model_type"') from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"transformers refuses this configuration: {hub.first_line(error)}") from error
    if built is None:
        raise ValueError(unknown)
    for name in _POSITIONS:
        if name not in requested and 0 < (getattr(built, name, None) or 0) < context:
            setattr(built, name, context)
    return built


def _check_sizes(config: Any, context: int, vocabulary: int) -> None:
    """Raise ValueError if the model's vocabulary or context length is too small."""
    if (config.vocab_size or 0) < vocabulary:
        raise ValueError(
            f"the model's vocab_size is {config.vocab_size}, but the text has {vocabulary} kinds of tokens"
        )
    for name in _POSITIONS:
        if 0 < (getattr(config, name, None) or 0) < context:
            raise ValueError(
                f"the model looks back on {getattr(config, name)} tokens ({name}), but the context is {context}"
            )


def _has_experts(config: Any) -> bool:
    """Return True if the configuration has a field for experts."""
    return any("expert" in name for name in config.to_dict())


def _asks_for_dropout(requested: Mapping[str, Any]) -> bool:
    """Return True if the requested configuration sets any dropout rate."""
    return any("drop" in name and value for name, value in requested.items())


def _switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate to zero: in modules and in the configurations that they read.

    Every field whose name contains "drop" is one: dropout, attention_dropout, hidden_dropout, resid_pdrop, layerdrop, …
    (issue 11, A8). Remaining randomness is found by trying (training/rehearsal/exactness.py).
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero(module)
        _zero_config(getattr(module, "config", None))


def _zero_config(config: Any) -> None:
    """Set every dropout rate to zero in a configuration and in those inside it."""
    if config is None or not hasattr(config, "to_dict"):
        return
    _zero(config)
    for inner in list(vars(config).values()):
        _zero_config(inner)


def _zero(holder: Any) -> None:
    """Set every attribute whose name contains "drop" to zero."""
    for name, value in list(vars(holder).items()):
        if "drop" in name.lower() and isinstance(value, float):
            setattr(holder, name, 0.0)


def _source_of_model(configuration: str) -> str:
    """Return the source code of the library's model; empty if it does not exist.

    Some fields are read there that no configuration lists.
    """
    spec = find_spec(configuration.replace("configuration_", "modeling_"))
    return Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""


def _unknown(requested: Mapping[str, Any]) -> str:
    """Return a sentence about a key that this type of model does not know; empty if all are known.

    The library would store it and ignore it, as with a misspelt `hiden_size`.
    """
    from transformers import AutoConfig

    kind = requested["model_type"]
    default: Any = AutoConfig.for_model(kind)
    accepted = {
        name for name in (*default.to_dict(), *vars(default), *default.attribute_map) if not name.startswith("_")
    }
    for part in type(default).__mro__:
        accepted |= set(vars(part).get("__annotations__", {}))
        if "__init__" in vars(part):
            accepted |= set(inspect.signature(vars(part)["__init__"]).parameters)
    accepted |= _ALWAYS
    read = _source_of_model(type(default).__module__)
    for name in requested:
        if name not in accepted and not re.search(rf"""[."']{re.escape(name)}\b""", read):
            close = difflib.get_close_matches(name, sorted(accepted), 1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            return f"a configuration of {kind!r} has no field {name!r}{meant}"
    return ""


def _keep_float64(model: nn.Module) -> None:
    """Let norms compute in float64 if the model does; the library's own would compute in float32.

    Their rounding depends on the number of tokens processed at once, so a float64 proof of a layout would find 1e-7.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_norm, module, module.forward)


def _norm(module: Any, otherwise: Any, x: Tensor) -> Tensor:
    """Compute the RMS norm in float64, or call the original forward for other dtypes."""
    if x.dtype != torch.float64:
        return otherwise(x)
    scale: Tensor = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (x * scale)
