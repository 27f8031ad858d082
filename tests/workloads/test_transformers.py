from __future__ import annotations

from pathlib import Path

import pytest
import torch

from labkit.workloads.base import Blocks
from labkit.workloads.language import CHAINED, Language, is_chain
from labkit.workloads.models.decoder import chain
from tests.workloads.helpers import train

pytest.importorskip("transformers", reason="needs the extra 'hub'")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}


def options(config: dict, **more: object) -> dict:
    return {"model": "transformers", "transformers_config": config, "context": 32, "max_characters": 50_000} | more


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=lambda c: c["model_type"])
def test_a_model_from_its_configuration_learns(config: dict) -> None:
    task = Language.build(options(config), 0)
    x = task.train.__getitems__([0, 1])["x"]
    assert task.model(x).shape == (2, 32, 256)
    assert torch.equal(task.model(x), task.model(x)), "dropout is on"
    losses = train(task, 12, 8, 1e-2)
    assert losses[-1] < losses[0] - 0.5


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (Language.build(options(LLAMA), seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_folder_with_a_trained_model_brings_its_weights_and_its_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[unk]", "the", "of", "a", "is", "to"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]").save_pretrained(tmp_path)
    stored = LlamaForCausalLM(LlamaConfig(vocab_size=6, **{k: v for k, v in LLAMA.items() if k != "model_type"}))
    stored.save_pretrained(tmp_path)

    chosen = {"model": "transformers", "pretrained": str(tmp_path), "context": 16, "max_characters": 50_000}
    task = Language.build(chosen, 0)
    assert task.corpus.vocabulary == 6
    assert task.corpus.tokens_per_character < 0.5  # words, not bytes
    x = task.train.__getitems__([0])["x"]
    torch.testing.assert_close(task.model(x), stored(input_ids=x).logits)


KINDS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("kind", CHAINED)
def test_a_chain_computes_what_the_library_computes(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = LLAMA | {"vocab_size": 64} | KINDS[kind] | {"model_type": kind}
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).double()
    tokens = torch.randint(64, (2, 16))
    expected = whole(input_ids=tokens, use_cache=False).logits
    parts = chain(whole)
    torch.testing.assert_close(parts(tokens), expected, rtol=0, atol=1e-12)
    names = {name.rsplit(".", 1)[0] for name, _ in parts.named_parameters()}
    assert len(list(parts.parameters())) == len(list(whole.parameters())), "nothing is left out"
    assert all(name.startswith("blocks.") for name in names)


def test_what_looks_back_less_far_is_no_chain() -> None:
    assert is_chain(LLAMA, 32)
    assert not is_chain(GPT2, 32)
    window = LLAMA | {"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 4}
    assert is_chain(window, 16)
    assert not is_chain(window, 17)
    assert not isinstance(Language.build(options(window), 0).model, Blocks)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "no-such-model"}, "transformers refuses this configuration"),
        (LLAMA | {"vocab_size": 10}, "the model's vocab_size is 10, but the text has 256 kinds of tokens"),
        (LLAMA | {"max_position_embeddings": 8}, "the model looks back on 8 tokens"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(config: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Language.build(options(config), 0)


DROPPING = {
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "biogpt": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
}


@pytest.mark.parametrize("kind", DROPPING)
def test_dropout_of_every_name_is_switched_off_also_in_what_is_stored(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from labkit.workloads.models.transformers import causal_model

    config = AutoConfig.for_model(kind, vocab_size=256, **DROPPING[kind])
    if kind == "opt":
        config.word_embed_proj_dim = 32
    for name in [name for name in config.to_dict() if "drop" in name]:
        setattr(config, name, 0.4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = causal_model(None, str(tmp_path), 16, 256, 0).train()
    tokens = torch.arange(16).unsqueeze(0)
    outputs = [model(tokens) for _ in range(4)]
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_dropout_that_is_asked_for_stays() -> None:
    model = Language.build(options(GPT2 | {"resid_pdrop": 0.5}), 0).model.train()
    tokens = torch.arange(16).unsqueeze(0)
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (LLAMA | {"hiden_size": 64}, "'llama' has no field 'hiden_size'; did you mean 'hidden_size'"),
        (GPT2 | {"n_heads": 2}, "'gpt2' has no field 'n_heads'; did you mean 'n_head'"),
        (LLAMA | {"zzz": 2}, "'llama' has no field 'zzz'$"),
    ],
)
def test_a_misspelt_field_is_refused(config: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Language.build(options(config), 0)


MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_compute_in_float64_what_they_compute_in_float32(kind: str) -> None:
    config = LLAMA | {"model_type": kind, "num_key_value_heads": 4} | MIXTURES[kind]
    model = Language.build(options(config), 0).model
    tokens = torch.arange(16).unsqueeze(0)
    narrow = model(tokens)
    wide = model.double()(tokens)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), narrow, rtol=0, atol=1e-4)
    wide.sum().backward()
    torch.testing.assert_close(model.float()(tokens), narrow)


def test_a_model_that_memory_cannot_hold_is_refused_with_one_that_runs() -> None:
    import json

    from labkit.workloads.sizes import SMALL_LLAMA
    from tests.workloads.helpers import reasons

    section = {"name": "language", "model": "transformers"}
    for config in ({"model_type": "llama"}, {"model_type": "llama", "hiden_size": 64}, {"model_type": "mixtral"}):
        (reason,) = reasons(section | {"transformers_config": config})
        assert "billion parameters need at least" in reason
        assert SMALL_LLAMA in reason
    assert reasons(section | {"transformers_config": json.loads(SMALL_LLAMA)}) == []
    assert reasons(section | {"transformers_config": GPT2}) == []
    assert Language.build(options(json.loads(SMALL_LLAMA)), 0).model is not None
    (reason,) = reasons({"name": "language", "width": 8192, "depth": 64, "heads": 64})
    assert "billion parameters" in reason
