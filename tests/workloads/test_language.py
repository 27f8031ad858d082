from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from labkit.workloads.language import Language
from labkit.workloads.models.experts import MixtureOfExperts
from labkit.workloads.models.gpt import gpt
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


def test_a_mixture_of_experts_is_the_weighted_sum_of_the_chosen_ones() -> None:
    torch.manual_seed(0)
    block = MixtureOfExperts(16, experts=4, experts_per_token=2).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    weights, chosen = block.route(x.flatten(0, 1))
    assert len(chosen.unique()) == 4
    torch.testing.assert_close(weights.sum(1), torch.ones(15, dtype=torch.float64))
    expected = torch.stack(
        [
            sum(weight * block.experts[int(expert)](token) for weight, expert in zip(*choice, strict=True))
            for token, *choice in zip(x.flatten(0, 1), weights, chosen, strict=True)
        ]
    )
    torch.testing.assert_close(block(x).flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    torch.manual_seed(0)
    block = MixtureOfExperts(8, experts=3, experts_per_token=1)
    with torch.no_grad():
        block.router.weight.zero_()  # equal scores: every token goes to the same expert
    block(torch.randn(4, 8)).sum().backward()
    used = [expert.up.weight.grad.abs().sum().item() > 0 for expert in block.experts]
    assert sum(used) == 1
    assert all(expert.up.weight.grad is not None for expert in block.experts)


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
        ({"model": "transformers"}, {}, "workload.transformers_config: a model of transformers needs either"),
        ({"model": "transformers", "transformers_config": {}}, {}, 'workload.transformers_config: has no "model_type"'),
        ({"model": "transformers", "pretrained": "./none"}, {}, "workload.pretrained: there is no folder ./none"),
        ({"pretrained": "gpt2"}, {}, "workload.pretrained: belongs to model=transformers, the model here is gpt"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(options: dict, training: dict, sentence: str) -> None:
    found = reasons({"name": "language"} | options, **training)
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_what_can_be_built_is_not_refused() -> None:
    assert reasons({"name": "language"}) == []
