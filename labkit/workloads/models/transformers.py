"""A causal model of Hugging Face `transformers` in the form that the ranks train: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.workloads import hub
from labkit.workloads.language import is_chain
from labkit.workloads.models.decoder import chain
from labkit.workloads.rules import is_path
from labkit.workloads.seed import seeded
from labkit.workloads.text import Encode

_POSITIONS = ("max_position_embeddings", "n_positions")


class CausalModel(nn.Module):
    """Wraps the library's model: [N, T] int64 to logits [N, T, vocabulary], without cache and without its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def causal_model(
    config: Mapping[str, Any] | None, pretrained: str, context: int, vocabulary: int, seed: int
) -> nn.Module:
    """A chain of blocks where the model is one (labkit.workloads.models.decoder), else the library's model wrapped.

    From a configuration with random weights from `seed`, or from a folder or id with its trained weights.

    Dropout is switched off unless the configuration asks for it: each rank would draw other random numbers than one
    process does, and the layouts could no longer be compared. Raises ValueError in one sentence.
    """
    from transformers import AutoModelForCausalLM

    if pretrained:
        try:
            loaded = AutoModelForCausalLM.from_pretrained(pretrained, dtype="float32", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(hub.sentence(pretrained, error)) from error
        _switch_off_dropout(loaded, {})
        _check_sizes(loaded.config, context, vocabulary)
        return _as_blocks(loaded.train(), context)
    wanted = dict(config or {})
    built = _configuration(wanted, context, vocabulary)
    _check_sizes(built, context, vocabulary)
    with seeded(seed):
        try:
            model = AutoModelForCausalLM.from_config(built)  # type: ignore[no-untyped-call]
        except (ValueError, TypeError) as error:
            raise ValueError(f"transformers cannot build {wanted['model_type']!r}: {hub.first_line(error)}") from error
    _switch_off_dropout(model, wanted)
    return _as_blocks(model.float().train(), context)


def _as_blocks(model: Any, context: int) -> nn.Module:
    _keep_float64(model)
    settings = model.config.to_dict() | {"attn_implementation": model.config._attn_implementation}
    return chain(model) if is_chain(settings, context) else CausalModel(model)


def encoder(pretrained: str) -> tuple[Encode, int]:
    """The tokenizer of a trained model, and the size of its vocabulary."""
    if not is_path(pretrained):
        hub.use_cache_when_offline()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(hub.sentence(pretrained, error)) from error

    def encode(text: str) -> np.ndarray[Any, Any]:
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)

    return encode, len(tokenizer)


def _configuration(wanted: Mapping[str, Any], context: int, vocabulary: int) -> Any:
    from transformers import AutoConfig

    overrides = {"vocab_size": vocabulary} | {name: value for name, value in wanted.items() if name != "model_type"}
    try:
        # Token numbers of the model's original vocabulary (begin, end, padding) mean nothing among bytes.
        special = {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name not in wanted}
        built = AutoConfig.for_model(wanted["model_type"], **special, **overrides)
    except KeyError:
        raise ValueError('the configuration of a transformers model needs a "model_type"') from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"transformers refuses this configuration: {hub.first_line(error)}") from error
    for name in _POSITIONS:
        if name not in wanted and 0 < (getattr(built, name, None) or 0) < context:
            setattr(built, name, context)
    return built


def _check_sizes(config: Any, context: int, vocabulary: int) -> None:
    if (config.vocab_size or 0) < vocabulary:
        raise ValueError(f"the model's vocab_size is {config.vocab_size}, the text has {vocabulary} kinds of tokens")
    for name in _POSITIONS:
        if 0 < (getattr(config, name, None) or 0) < context:
            raise ValueError(f"the model looks back on {getattr(config, name)} tokens ({name}), context is {context}")


def _switch_off_dropout(model: nn.Module, wanted: Mapping[str, Any]) -> None:
    if any("drop" in name for name in wanted):
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _keep_float64(model: nn.Module) -> None:
    """Let norms compute in float64 where the model does; the library's would go through float32.

    Their rounding depends on how many tokens there are at once, so a float64 proof of a layout would find 1e-7.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = partial(_norm, module, module.forward)


def _norm(module: Any, otherwise: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float64:
        return otherwise(x)
    scale: Tensor = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (x * scale)
