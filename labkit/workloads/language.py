"""Next-token prediction: a GPT or any causal model of `transformers`, on Python's documentation or on any text.

The form and the command line import this file too: torch, datasets and transformers are imported inside `build()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue

from labkit.experiment.problem import Problem
from labkit.experiment.registry import Options
from labkit.workloads.network import Network
from labkit.workloads.rules import extra_missing, hub_data, is_path, nearest_divisor, without_effect
from labkit.workloads.sizes import SMALL_LLAMA, gpt_parameters, needed_bytes, transformers_parameters

if TYPE_CHECKING:
    from torch import nn

    from labkit.experiment.machine import Machine
    from labkit.experiment.schema import Experiment
    from labkit.workloads.base import Task

DOCUMENTATION = "python-docs"
BYTES = 256
_OF_EXPERTS = ("experts_per_token", "capacity", "balance_loss")


class LanguageOptions(Options):
    """Which text is predicted, and by which network."""

    model: Literal["gpt", "transformers"] = "gpt"
    """The network: labkit's own GPT, or a causal model of the transformers library."""
    data: str = Field(default=DOCUMENTATION, min_length=1, max_length=500)
    """Text: python-docs (no download), a file or folder of text, JSON, CSV or parquet, or a data set from the Hub."""
    context: int = Field(default=64, ge=4, le=65536)
    """Context length: tokens per sample."""
    width: int = Field(default=128, ge=8, le=8192)
    """Embedding size of the GPT."""
    depth: int = Field(default=2, ge=1, le=128)
    """Number of layers of the GPT."""
    heads: int = Field(default=4, ge=1, le=128)
    """Number of attention heads of the GPT; must divide the width."""
    experts: int = Field(default=0, ge=0, le=256)
    """Experts in each layer of the GPT; 0 for a plain MLP."""
    experts_per_token: int = Field(default=2, ge=1, le=16)
    """Experts that process each token, if there are experts."""
    capacity: float = Field(default=0.0, ge=0, le=64)
    """Maximum tokens of a sequence per expert, as a multiple of an even share; 0 for no limit."""
    balance_loss: float = Field(default=0.0, ge=0, le=100)
    """Weight of the load-balancing loss of the experts; it affects the gradient, but not the reported loss."""
    mlp_growth: float = Field(default=1.0, ge=1, le=64)
    """Width of the last layer's MLP as a multiple of the first one's; above 1, the layers take unequal time."""
    tied: bool = False
    """Tie the GPT's output layer to its token embedding: both share one weight."""
    transformers_config: dict[str, JsonValue] | None = None
    """Configuration of a transformers model, e.g. {"model_type": "llama", "hidden_size": 128, ...}."""
    pretrained: str = Field(default="", max_length=500)
    """Pretrained transformers model: a local folder or an id on the Hub; it brings its own tokenizer."""
    text_column: str = Field(default="", max_length=200)
    """Column with the text; empty to detect it."""
    max_characters: int = Field(default=10_000_000, ge=1000, le=10**10)
    """Maximum length of the text that is read (characters)."""


class Language:
    """Next-token prediction; the metric is held-out bits per character."""

    Options = LanguageOptions

    @classmethod
    def problems(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        options = LanguageOptions(**experiment.workload.options)
        wrong = list(_network_problems(options))
        yield from wrong or _memory_problems(options, experiment, machine)
        if options.data == DOCUMENTATION:
            yield from _batch_problems(options, experiment.training.global_batch)
        elif not _plain_text(options.data):
            yield from hub_data("workload.data", options.data, builtin=DOCUMENTATION)

    @classmethod
    def warnings(cls, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
        """Warn about options that do nothing with the chosen network."""
        options = LanguageOptions(**experiment.workload.options)
        if options.model == "transformers":
            names = ("width", "depth", "heads", "experts", *_OF_EXPERTS, "mlp_growth", "tied")
            yield from without_effect(options, names, "a transformers model has its own sizes")
        elif not options.experts:
            yield from without_effect(options, _OF_EXPERTS, "there are no experts")
        else:
            yield from without_effect(options, ("mlp_growth",), "experts take the place of the MLPs")

    @classmethod
    def describe(cls, options: LanguageOptions) -> Network:
        """Return what layouts need to know of the network."""
        if options.model == "transformers":
            return _describe_transformers(options)
        return Network(
            options.depth + 2,
            tp_sizes={f"the {options.heads} attention heads": options.heads, f"a vocabulary of {BYTES}": BYTES},
            sequence=options.context,
            experts=options.experts,
            expert_capacity=options.capacity > 0,
        )

    @classmethod
    def build(cls, options: Any, seed: int) -> Task:
        """Read the text and build the network from a LanguageOptions, a dict of its fields, or a workload section."""
        from labkit.workloads.language_task import LanguageTask
        from labkit.workloads.options import read
        from labkit.workloads.text import Corpus, encode_bytes, python_documentation

        options = read(LanguageOptions, options)
        if options.data == DOCUMENTATION:
            text, held_out, about = python_documentation()[: options.max_characters], None, dict[str, Any]()
        else:
            from labkit.workloads.hub_text import hub_text

            text, held_out, about = hub_text(options.data, options.text_column, options.max_characters)
        model: nn.Module
        if options.model == "transformers":
            from labkit.workloads.models.transformers import causal_model, encoder

            encode, vocabulary = encoder(options.pretrained) if options.pretrained else (encode_bytes, BYTES)
            model = causal_model(options.transformers_config, options.pretrained, options.context, vocabulary, seed)
        else:
            from labkit.workloads.models.gpt import gpt
            from labkit.workloads.seed import seeded

            encode, vocabulary = encode_bytes, BYTES
            with seeded(seed):
                model = gpt(
                    vocabulary,
                    options.context,
                    options.width,
                    options.depth,
                    options.heads,
                    options.experts,
                    options.experts_per_token,
                    options.capacity,
                    options.balance_loss,
                    options.mlp_growth,
                    options.tied,
                )
        corpus = Corpus.from_text(text, held_out, encode, vocabulary)
        _refuse_leak(options, model, vocabulary)
        return LanguageTask(model, corpus, options.context, data=options.data, about=about)


def _describe_transformers(options: LanguageOptions) -> Network:
    """Return what layouts need to know of a model of transformers; only ranks read the sizes of a pretrained one."""
    config = dict(options.transformers_config or {})
    if not options.pretrained and not is_chain(config, options.context):
        return Network(unsplittable=f"a {config.get('model_type')} model of transformers")
    layers, sizes = config.get("num_hidden_layers"), {"vocab_size": BYTES} | config if config else {}
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    return Network(
        layers + 2 if isinstance(layers, int) else None,
        tp_sizes={f"{name} {size}": size for name in names if isinstance(size := sizes.get(name), int)},
        sequence=options.context,
        keeps_norms_whole="labkit does not cut the norms of a model of transformers",
        attention_dropout=bool(config.get("attention_dropout")),
    )


def _refuse_leak(options: LanguageOptions, model: nn.Module, vocabulary: int) -> None:
    """Raise ValueError if the model is not causal or cannot run with these settings."""
    from labkit.workloads.causal import MAX_TOKENS, refuse_leak

    config = options.transformers_config or {}
    # labkit's own network computes the same for any length: a short test takes a tenth of the time.
    longest = 32 if options.model == "gpt" else MAX_TOKENS
    name, advice = options.pretrained or str(config.get("model_type", "gpt")), ""
    if config and not config.get("is_decoder"):
        advice = 'set "is_decoder": true in workload.transformers_config, or choose a decoder such as llama'
    elif options.model == "transformers":
        advice = "choose a decoder such as llama"
    try:
        refuse_leak(model, vocabulary, options.context, name, advice, longest)
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        from labkit.workloads.hub import first_line

        hint = "" if not config or "pad_token_id" in config else '; some models need a "pad_token_id"'
        raise ValueError(f"{name} cannot run with these settings: {first_line(error)}{hint}") from error


MASKED_BY_ITSELF = (None, "sdpa", "flash_attention_2", "flash_attention_3")
"""Attention implementations that are causal without an explicit mask, as in a chain of blocks."""
CHAINED = ("llama", "mistral", "qwen2", "qwen3")
"""Types of transformers models that labkit can split into blocks."""


def is_chain(config: Mapping[str, Any], context: int) -> bool:
    """Return True if such a transformers model can be split into blocks.

    It must be of a known type, no token may look back less far than `context`, and its attention must be causal by
    itself, without the mask that the library would make.
    """
    window = config.get("sliding_window")
    kinds = [config.get(name) for name in ("attn_implementation", "_attn_implementation")]
    return (
        config.get("model_type") in CHAINED
        and (not isinstance(window, int) or window >= context)
        and all(kind in MASKED_BY_ITSELF for kind in kinds)
    )


def _network_problems(options: LanguageOptions) -> Iterator[Problem]:
    """Yield the problems of the network's options."""
    if options.model == "transformers":
        yield from extra_missing("workload.model", "transformers", "hub", "a transformers model")
        config = options.transformers_config
        if bool(options.pretrained) == (config is not None):
            yield Problem(
                "workload.transformers_config",
                "a transformers model needs either its configuration here or a folder or id in workload.pretrained",
                SMALL_LLAMA if config is None else None,
            )
        if config is not None and not isinstance(config.get("model_type"), str):
            yield Problem("workload.transformers_config", 'has no "model_type"', SMALL_LLAMA)
        if options.pretrained and is_path(options.pretrained) and not Path(options.pretrained).expanduser().is_dir():
            yield Problem("workload.pretrained", f"there is no folder {options.pretrained}")
        return
    if options.width % options.heads:
        yield Problem(
            "workload.heads",
            f"{options.heads} heads do not divide a width of {options.width}",
            nearest_divisor(options.width, options.heads),
        )
    if options.experts and options.experts_per_token > options.experts:
        yield Problem(
            "workload.experts_per_token",
            f"{options.experts_per_token} experts per token, but there are only {options.experts}",
            options.experts,
        )
    for name in ("transformers_config", "pretrained"):
        if getattr(options, name):
            yield Problem(f"workload.{name}", "belongs to model=transformers, but the model here is gpt")


def _memory_problems(options: LanguageOptions, experiment: Experiment, machine: Machine) -> Iterator[Problem]:
    """Yield a problem if the network does not fit into this machine's memory when it is trained on the CPU.

    The memory of GPUs is not checked before the run.
    """
    if options.pretrained or machine.device(experiment.launch.device) != "cpu":
        return
    config = options.transformers_config
    if config is not None:
        parameters = transformers_parameters(config, BYTES)
        field, smaller = "workload.transformers_config", SMALL_LLAMA
    else:
        parameters = gpt_parameters(options.width, options.depth, options.experts, BYTES, options.context)
        field, smaller = "workload.width", "128"
    layout = experiment.layout
    needed = needed_bytes(parameters, max(1, layout.dp_replicate), max(1, layout.world_size))
    if needed > machine.memory_bytes:
        yield Problem(
            field,
            f"about {parameters / 1e9:.1f} billion parameters need at least {needed / 2**30:.0f} GiB to be trained in "
            f"this layout, but this machine has {machine.memory_bytes / 2**30:.0f} GiB",
            smaller,
        )


def _batch_problems(options: LanguageOptions, global_batch: int) -> Iterator[Problem]:
    """Require at least one batch of windows in the documentation (its bytes are counted, nothing is built)."""
    from pydoc_data.topics import topics

    if options.pretrained:  # its tokenizer decides how many tokens there are
        return
    length = min(options.max_characters, sum(map(len, topics.values())))
    windows = int(length * 0.9) // options.context
    if windows < 1 or length - int(length * 0.9) <= options.context:
        yield Problem("workload.context", f"the text of {length} characters is too short for it", 64)
    elif global_batch > windows:
        yield Problem(
            "training.global_batch",
            f"the text has {windows} windows of {options.context} tokens, fewer than a batch of {global_batch}",
            windows,
        )


def _plain_text(data: str) -> bool:
    """Return True for an existing file of text, JSON or CSV, which is read without any package."""
    path = Path(data).expanduser()
    return path.is_file() and path.suffix.lower() not in (".parquet", ".arrow", ".feather")
