"""A model that sees the tokens it has to predict is refused when it is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from labkit.workloads.causal import first_leak, refuse_leak
from labkit.workloads.language import Language, is_chain

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def build(**config: Any) -> Any:
    pytest.importorskip("transformers", reason="needs the extra 'hub'")
    options = {"model": "transformers", "context": 32, "max_characters": 20_000}
    return Language.build(options | {"transformers_config": config}, 0)


class Mixer(nn.Module):
    """Scores from this token and, with the weights `mix`, from the others."""

    def __init__(self, mix: Tensor, start: float = 1.0) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 8)
        self.out = nn.Linear(8, 11)
        self.strength = nn.Parameter(torch.tensor(start))
        self.drop = nn.Dropout(0.5)
        self.register_buffer("mix", mix)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.token(tokens)
        length = tokens.shape[1]
        return self.out(self.drop(x + self.strength * torch.einsum("ts,nsw->ntw", self.mix[:length, :length], x)))


def test_a_leak_is_seen_however_small_and_also_where_it_starts_at_zero() -> None:
    past = torch.tril(torch.ones(16, 16))
    assert first_leak(Mixer(past), 11, 16) is None
    assert first_leak(Mixer(past, 0.0), 11, 16) is None
    for start in (1.0, 0.0):
        assert first_leak(Mixer(past + torch.triu(torch.full((16, 16), 0.02), 1), start), 11, 16) == (0, 15)
    with pytest.raises(ValueError, match="is not a causal model: changing token 15 moves its scores at position 0"):
        refuse_leak(Mixer(torch.ones(16, 16)), 11, 16, "mixer")


@pytest.mark.parametrize("reach", [1, 2, 5])
def test_a_look_of_a_few_tokens_ahead_is_seen(reach: int) -> None:
    mix = torch.diag(torch.ones(16 - reach), reach)
    leak = first_leak(Mixer(mix), 11, 16)
    assert leak is not None
    assert leak[1] - leak[0] <= reach


def test_nothing_is_left_behind() -> None:
    model = Mixer(torch.ones(16, 16), 0.0)
    model.out.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert first_leak(model, 11, 16) is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_is_refused_with_what_to_set(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind} is not a causal model: .* set \"is_decoder\": true"):
        build(model_type=kind, pad_token_id=0, **{name: size for name, size in SMALL.items() if "key" not in name})


def test_the_same_encoder_as_a_decoder_is_taken() -> None:
    assert (
        build(model_type="bert", is_decoder=True, **{k: v for k, v in SMALL.items() if "key" not in k}).model
        is not None
    )


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_eager_attention_gets_the_librarys_mask(field: str, kind: str) -> None:
    config = {"model_type": kind, field: "eager"} | SMALL
    assert not is_chain(config, 32)
    task = build(**config)
    tokens = task.train.__getitems__([0])["x"]
    other = tokens.clone()
    other[0, -1] += 1
    difference = (task.model(tokens) - task.model(other))[0, :-1].abs().max()
    assert difference < 1e-5


def test_decoders_of_many_kinds_are_taken() -> None:
    for kind, more in {"llama": {}, "mistral": {"sliding_window": 8}, "opt": {}}.items():
        assert (
            build(
                model_type=kind,
                **(
                    SMALL | more
                    if kind != "opt"
                    else {
                        "hidden_size": 32,
                        "ffn_dim": 64,
                        "num_hidden_layers": 1,
                        "num_attention_heads": 4,
                        "word_embed_proj_dim": 32,
                    }
                ),
            )
            is not None
        )
    assert Language.build({"context": 16, "width": 16, "depth": 1}, 0).model is not None
