"""The model FLOPs of a sample: what the convention counts, the same on every kernel, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.experiment.recipes import recipe
from labkit.launch import launch
from labkit.runs import Run
from labkit.training.rehearsal.model_flops import count_model_flops
from labkit.workloads.models.gpt import gpt
from tests.training.test_rehearsal import custom, run

VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS = 50, 16, 32, 2, 4


def counted(model: nn.Module | Callable[[Tensor], Any], x: Tensor) -> int | None:
    """Count a model on the samples x."""

    def forward() -> int:
        model(x)
        return len(x)

    return count_model_flops(forward)[0]


def gpt_by_hand() -> int:
    """Three times the products of one sequence, written out: four projections, two layers of the MLP, attention."""
    weights = DEPTH * (4 + 2 * 4) * WIDTH**2 + WIDTH * VOCABULARY
    attention = DEPTH * 2 * (2 * CONTEXT * CONTEXT * WIDTH)  # scores, and their product with the values, in full
    return 3 * (2 * CONTEXT * weights + attention)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_gpt_counts_what_its_formula_says(samples: int) -> None:
    tokens = torch.zeros(samples, CONTEXT, dtype=torch.int64)
    assert counted(gpt(VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS), tokens) == gpt_by_hand()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_the_same_whatever_kernel_computes_it(backend: SDPBackend, causal: bool) -> None:
    def attend(x: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=causal)

    assert counted(attend, torch.randn(2, 4, 16, 8)) == 3 * 2 * (2 * 4 * 16 * 16 * 8)


def recurrent(kind: type[nn.RNNBase], gates: int) -> tuple[nn.Module, Tensor, int]:
    width, hidden, length, samples = 8, 16, 5, 2
    flops = 2 * length * gates * hidden * (width + hidden)
    return kind(width, hidden, batch_first=True), torch.randn(samples, length, width), 3 * flops


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count(kind: type[nn.RNNBase], gates: int) -> None:
    model, x, flops = recurrent(kind, gates)
    assert counted(model, x) == flops


def test_a_product_with_a_vector_counts() -> None:
    matrix = torch.randn(6, 5)
    assert counted(lambda x: matrix @ x[0], torch.randn(1, 5)) == 3 * 2 * 30


def test_convolutions_count() -> None:
    assert counted(nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 8, 8)) == 3 * 2 * (3 * 4 * 9) * 64


def test_a_compiled_part_counts_as_it_was_written() -> None:
    model = nn.Sequential(nn.Linear(4, 8), torch.compile(nn.Linear(8, 2)))
    assert counted(model, torch.randn(2, 4)) == 3 * 2 * (32 + 16)


@torch.library.custom_op("labkit_test::secret", mutates_args=())
def secret(x: Tensor) -> Tensor:
    return x.clone()


def reason(model: Callable[[Tensor], Any], x: Tensor) -> str:
    def forward() -> int:
        model(x)
        return len(x)

    flops, sentence = count_model_flops(forward)
    assert flops is None
    return sentence


def fails(x: Tensor) -> Tensor:
    raise ValueError("only once")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda x: secret(x @ x), "labkit_test::secret"),
        (lambda x: nn.Bilinear(4, 4, 2)(x, x), "aten::_trilinear"),
        (lambda x: x * 2, "no matrix product"),
        (fails, "ValueError: only once"),
    ],
)
def test_what_cannot_be_counted_has_a_reason_instead_of_a_figure(model: Callable[[Tensor], Any], says: str) -> None:
    assert says in reason(model, torch.randn(4, 4))


def test_nothing_of_the_counter_stays_behind() -> None:
    modules = torch.nn.modules.module
    before = len(modules._global_forward_pre_hooks), len(modules._global_forward_hooks)
    reason(nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5)), torch.randn(4, 4))
    assert (len(modules._global_forward_pre_hooks), len(modules._global_forward_hooks)) == before


# -- real runs ---------------------------------------------------------------------------------------------------------


def language(layout: dict[str, Any], **changes: Any) -> Run:
    sizes = {"workload.depth": DEPTH, "workload.width": WIDTH, "workload.context": CONTEXT, "workload.heads": HEADS}
    short = {"training.steps": 2, "training.evaluate_every": 0, "training.checkpoint_every": 0}
    experiment = recipe("language-ddp").set(sizes | short | {"layout": layout, "training.global_batch": 8} | changes)
    finished = launch(experiment.set({"launch.device": "cpu"}), baseline=None).wait(120)
    assert finished.state == "finished", finished.cause
    return finished


@lru_cache
def one_process() -> float:
    flops = language({}).summary()["model_flops_per_sample"]
    assert flops > 0
    return float(flops)


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "sequence_parallel": True},
        {"pp": 2, "microbatches": 2},
        {"dp_shard": 2, "zero_stage": 3, "activation_checkpointing": "full"},
    ],
    ids=["tp", "pp", "zero"],
)
def test_no_layout_changes_what_a_sample_costs(layout: dict[str, Any]) -> None:
    assert language(layout).summary()["model_flops_per_sample"] == one_process()


def test_neither_do_sparse_weights_and_narrow_numbers() -> None:
    changes = {"quantization.training": "int8", "sparsity.method": "static", "sparsity.target": 0.5}
    assert language({}, **changes).summary()["model_flops_per_sample"] == one_process()


def test_a_task_that_cannot_be_counted_trains_and_says_so() -> None:
    finished = run(custom("without_products", layout="1"))
    summary = finished.summary()
    assert (finished.state, summary["model_flops_per_sample"], summary["mfu"]) == ("finished", None, None)
    assert any("the model FLOPs are not known" in note for note in summary["notes"])
