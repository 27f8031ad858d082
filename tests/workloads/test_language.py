from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.workloads.language import Language
from labkit.workloads.models.experts import MixtureOfExperts
from labkit.workloads.models.gpt import gpt, mlp_widths
from labkit.workloads.models.transformer import Attention
from labkit.workloads.sizes import transformers_parameters
from labkit.workloads.text import Corpus, Windows, encode_bytes, python_documentation
from tests.workloads.helpers import assert_split_equals_whole, evaluate, reasons, train

SMALL = {"width": 32, "depth": 2, "heads": 4, "context": 32}


def test_the_documentation_is_english_text_of_some_length() -> None:
    text = python_documentation()
    assert len(text) > 200_000
    assert text.count(" the ") > 2000
    assert text == python_documentation()


def test_held_out_text_is_the_end_of_the_corpus_and_nothing_overlaps() -> None:
    text = python_documentation()
    corpus = Corpus.from_text(text, None, encode_bytes, 256)
    assert corpus.train.tobytes() + corpus.test.tobytes() == text.encode()
    assert len(corpus.test) == pytest.approx(0.1 * len(text), rel=0.01)


def test_windows_are_fixed_do_not_overlap_and_the_target_is_one_token_later() -> None:
    windows = Windows(np.arange(101, dtype=np.int64), 10)
    assert len(windows) == 10
    batch = windows.__getitems__([0, 9, 0])
    assert batch["x"].dtype == batch["y"].dtype == torch.int64
    assert batch["x"][0].tolist() == list(range(10))
    assert batch["y"][1].tolist() == list(range(91, 101))
    assert torch.equal(batch["x"][:, 1:], batch["y"][:, :-1])
    everything = windows.__getitems__(range(10))["x"].flatten().tolist()
    assert everything == list(range(100))


@pytest.mark.parametrize("experts", [0, 4])
def test_a_later_token_changes_nothing_before_it(experts: int) -> None:
    model = gpt(256, 16, 32, 2, 4, experts)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-4


@pytest.mark.parametrize("context", [8, 32, 256])
def test_a_network_that_sees_later_tokens_is_not_built(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Language.build({**SMALL, "context": context}, 0)
    plain = Attention.__init__
    monkeypatch.setattr(Attention, "__init__", lambda self, width, heads, causal: plain(self, width, heads, False))
    with pytest.raises(ValueError, match="is not a causal model"):
        Language.build({**SMALL, "context": context}, 0)


def test_the_chain_of_blocks_is_the_network() -> None:
    task = Language.build(SMALL, 0)
    assert list(task.model.blocks) == ["embed", "layer_0", "layer_1", "head"]
    x = task.test.__getitems__(range(3))["x"]
    step = x
    for block in task.model.blocks.values():
        step = block(step)
    assert torch.equal(step, task.model(x))
    assert step.shape == (3, 32, 256)


@pytest.mark.parametrize("experts", [0, 4])
def test_gradients_of_a_split_batch_average_to_those_of_the_whole(experts: int) -> None:
    task = Language.build(SMALL | {"experts": experts}, 0)
    assert_split_equals_whole(task, task.train.__getitems__(range(7)), [4, 2, 1])


def one_by_one(block: MixtureOfExperts, x: torch.Tensor, room: int | None = None) -> torch.Tensor:
    """The mixture, token by token: whoever comes first is served first, and no later token takes its place."""
    out = torch.zeros_like(x)
    for sample, tokens in enumerate(x):
        best, chosen = block.router(tokens).topk(block.experts_per_token, dim=-1)
        weights, taken = best.softmax(-1), dict.fromkeys(range(len(block.experts.up)), 0)
        for place, token in enumerate(tokens):
            for choice in range(block.experts_per_token):
                expert = int(chosen[place, choice])
                taken[expert] += 1
                if room is None or taken[expert] <= room:
                    inner = torch.nn.functional.gelu(block.experts.up[expert] @ token)
                    out[sample, place] += weights[place, choice] * (block.experts.down[expert] @ inner)
    return out


def mixture(**options: float) -> tuple[MixtureOfExperts, torch.Tensor]:
    torch.manual_seed(0)
    block = MixtureOfExperts(16, experts=4, experts_per_token=2, **options).double()
    return block, torch.randn(3, 8, 16, dtype=torch.float64)


def test_a_mixture_of_experts_is_the_weighted_sum_of_the_chosen_ones() -> None:
    block, x = mixture()
    torch.testing.assert_close(block(x), one_by_one(block, x), rtol=1e-12, atol=1e-12)


def test_a_full_expert_drops_what_comes_later_in_the_same_sequence() -> None:
    block, x = mixture(capacity=0.75)
    room = 3  # ⌈0.75 · 2 choices · 8 tokens / 4 experts⌉
    torch.testing.assert_close(block(x), one_by_one(block, x, room), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(block(x), one_by_one(block, x)), "some token was dropped"
    parts = torch.cat([block(sample) for sample in x.split(1)])
    torch.testing.assert_close(block(x), parts, rtol=1e-12, atol=1e-12)


def test_the_balance_loss_pulls_towards_even_choice_and_leaves_the_result_alone() -> None:
    block, x = mixture()
    plain = block(x)
    plain.sum().backward()
    before = block.router.weight.grad.clone()
    block.zero_grad()
    block.balance_loss, block.sample_weight = 0.5, 1 / len(x)
    out = block(x)
    assert torch.equal(out, plain)
    out.sum().backward()
    scores = block.router(x)
    chosen = torch.nn.functional.one_hot(scores.topk(2, dim=-1).indices, 4).sum((1, 2)) / 16  # [sample, expert]
    loss = (4 * chosen * scores.softmax(-1).mean(1)).sum(1).mean()
    (expected,) = torch.autograd.grad(0.5 * loss, [block.router.weight])
    torch.testing.assert_close(block.router.weight.grad - before, expected, rtol=1e-10, atol=1e-12)


def test_the_load_counts_every_choice_once() -> None:
    block, x = mixture()
    block.load = torch.zeros(4, dtype=torch.int64)
    block(x)
    assert block.load.sum() == 2 * 3 * 8
    assert block.load.tolist() == torch.bincount(block.router(x).topk(2).indices.flatten(), minlength=4).tolist()


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    torch.manual_seed(0)
    block = MixtureOfExperts(8, experts=3, experts_per_token=1)
    with torch.no_grad():
        block.router.weight.zero_()  # equal scores: every token goes to the same expert
    block(torch.randn(1, 4, 8)).sum().backward()
    assert block.experts.up.grad is not None
    assert (block.experts.up.grad.flatten(1).abs().sum(1) > 0).sum() == 1


@given(st.integers(8, 64), st.integers(1, 9), st.floats(1, 16))
def test_growing_mlps_are_as_wide_on_the_average_as_even_ones(width: int, depth: int, growth: float) -> None:
    widths = mlp_widths(width, depth, growth)
    assert len(widths) == depth
    assert widths == sorted(widths)
    assert abs(sum(widths) / depth - 4 * width) <= 8
    if depth > 1 and widths[0] > 32:
        assert widths[-1] / widths[0] == pytest.approx(growth, rel=0.3)


def test_unigram_entropy_is_the_score_of_knowing_only_the_frequencies() -> None:
    # 3 a and 1 b to learn from, counts raised by one: shares 4/6 and 2/6.
    corpus = Corpus(np.array([0, 0, 0, 1]), np.array([0, 1]), 1.0, 2)
    assert corpus.unigram_entropy() == pytest.approx(-(math.log(4 / 6) + math.log(2 / 6)) / 2)
    facts = Language.build(SMALL, 0).facts()
    assert 4.0 < facts["unigram_entropy_bits"] < 5.2
    assert facts["unigram_entropy_nats"] < facts["uniform_entropy_nats"] == math.log(256)


def test_bits_per_character_count_characters_not_bytes() -> None:
    corpus = Corpus.from_text("ab" * 50, "äö", encode_bytes, 256)
    assert corpus.tokens_per_character == 2  # two bytes each
    assert corpus.bits_per_character(math.log(2)) == pytest.approx(2)  # one bit a byte is two bits a character
    task = Language.build(SMALL, 0)
    metrics = task.metrics({"count": 4.0, "loss": 4 * math.log(16)})
    assert metrics["loss"] == pytest.approx(math.log(16))
    assert metrics["bits_per_character"] == pytest.approx(4 * task.corpus.tokens_per_character)


def test_a_short_training_beats_the_unigram_entropy() -> None:
    task = Language.build(SMALL | {"max_characters": 100_000}, 0)
    untrained = evaluate(task)
    assert math.log(256) - 0.1 < untrained["loss"] < math.log(256) + 0.7  # knows nothing yet
    train(task, 150, 16, 1e-2)
    result = evaluate(task)
    assert result["bits_per_character"] < task.facts()["unigram_entropy_bits"] - 0.3
    assert evaluate(task, batch=50, parts=3) == pytest.approx(result, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "training", "sentence"),
    [
        ({"width": 50}, {}, "workload.heads: 4 heads do not divide a width of 50; nearest legal value: 5."),
        (
            {"experts": 2, "experts_per_token": 3},
            {},
            "workload.experts_per_token: 3 experts per token, but there are only 2",
        ),
        ({}, {"global_batch": 100_000}, "training.global_batch: the text has"),
        ({"context": 60_000}, {}, "workload.context: the text of"),
        ({"data": "no.txt"}, {}, "workload.data: there is no file or folder no.txt"),
        ({"model": "transformers"}, {}, "workload.transformers_config: a transformers model needs either"),
        ({"model": "transformers", "transformers_config": {}}, {}, 'workload.transformers_config: has no "model_type"'),
        ({"model": "transformers", "pretrained": "./none"}, {}, "workload.pretrained: there is no folder ./none"),
        ({"pretrained": "gpt2"}, {}, "workload.pretrained: belongs to model=transformers, but the model here is gpt"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(options: dict, training: dict, sentence: str) -> None:
    found = reasons({"name": "language"} | options, **training)
    assert len(found) == 1
    assert found[0].startswith(sentence)


@pytest.mark.parametrize("config", [None, {}])
def test_the_configuration_that_is_offered_is_small(config: dict | None) -> None:
    """issue 11, A14: a plain llama has seven billion parameters."""
    (sentence,) = reasons({"name": "language", "model": "transformers", "transformers_config": config})
    offered = json.loads(sentence.partition("nearest legal value: ")[2].rstrip("."))
    assert transformers_parameters(offered, 256) < 1e6
    assert reasons({"name": "language", "model": "transformers", "transformers_config": offered}) == []


def test_what_can_be_built_is_not_refused() -> None:
    assert reasons({"name": "language"}) == []
