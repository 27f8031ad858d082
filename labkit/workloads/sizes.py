"""The memory that a model needs, estimated from its configuration alone, before anything is imported or launched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SMALL_LLAMA = (
    '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, '
    '"num_attention_heads": 4, "num_key_value_heads": 4}'
)
"""A configuration that every machine can train."""

_DEFAULTS = {
    "llama": (4096, 32, 11008, 1),
    "mistral": (4096, 32, 14336, 1),
    "mixtral": (4096, 32, 14336, 8),
    "qwen2": (4096, 32, 22016, 1),
    "qwen3": (4096, 32, 22016, 1),
    "qwen2_moe": (2048, 24, 1408, 60),
    "qwen3_moe": (2048, 24, 768, 128),
    "gemma": (3072, 28, 24576, 1),
    "gemma2": (2304, 26, 9216, 1),
    "gemma3_text": (2304, 26, 9216, 1),
    "phi3": (3072, 32, 8192, 1),
    "gpt_neox": (6144, 44, 24576, 1),
    "gptj": (4096, 28, 16384, 1),
    "falcon": (4544, 32, 18176, 1),
    "bloom": (64, 2, 256, 1),
}
"""Width, layers, inner width and experts if the configuration does not name them (transformers 5)."""
_OTHERWISE = (768, 12, 3072, 1)
_GATED = ("llama", "mistral", "mixtral", "qwen", "gemma", "phi3", "olmo", "granite", "cohere", "deepseek")
_NAMES = (
    ("hidden_size", "n_embd", "d_model", "dim"),
    ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim"),
    ("num_local_experts", "num_experts", "n_routed_experts"),
)
BYTES_PER_WEIGHT = 16
"""Bytes of the weight, its gradient and AdamW's two moments in float32."""


def transformers_parameters(config: Mapping[str, Any], vocabulary: int) -> int:
    """Estimate the parameters of a causal model of this configuration: attention and MLP of each layer, embeddings.

    >>> 6.4e9 < transformers_parameters({"model_type": "llama"}, 32000) < 7.1e9
    True
    """
    kind = str(config.get("model_type"))
    defaults = _DEFAULTS.get(kind, _OTHERWISE)
    given = [next((config[name] for name in names if _is_size(config.get(name))), None) for names in _NAMES]
    width, layers, inner, experts = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
    if given[2] is None and given[0] is not None and defaults == _OTHERWISE:
        inner = 4 * width
    vocabulary = config["vocab_size"] if _is_size(config.get("vocab_size")) else vocabulary
    matrices = 3 if kind.startswith(_GATED) else 2
    heads: Any = config.get("num_attention_heads")
    shared: Any = config.get("num_key_value_heads")
    part = min(1.0, shared / heads) if _is_size(heads) and _is_size(shared) else 1
    return int(layers * ((2 + 2 * part) * width**2 + matrices * width * inner * experts) + 2 * vocabulary * width)


def gpt_parameters(width: int, depth: int, experts: int, vocabulary: int, context: int) -> int:
    """Estimate the parameters of labkit's own GPT."""
    return depth * (4 * width**2 + 8 * width**2 * max(1, experts)) + (2 * vocabulary + context) * width


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def needed_bytes(parameters: int, replicas: int, ranks: int) -> int:
    """Return the minimum memory of one machine: a whole model built by each rank, and training state per replica."""
    return parameters * (4 * ranks + (BYTES_PER_WEIGHT - 4) * replicas)
