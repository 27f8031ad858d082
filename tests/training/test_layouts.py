"""Every layout computes what one process computes, and saves what any other layout can go on with."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labkit.experiment import Experiment
from labkit.experiment.recipes import recipe
from labkit.launch import launch
from labkit.runs.data import RunData

STEPS = 4
EXACT = 1e-9

GPT = {"workload.depth": 6, "workload.width": 32, "workload.context": 32}
EXPERTS = {"workload.experts": 4, "workload.balance_loss": 0.1, "workload.capacity": 1.0}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("language-ddp", GPT),
    "tied gpt": ("language-ddp", {**GPT, "workload.tied": True}),
    "experts": ("language-ddp", {**GPT, **EXPERTS}),
    "experts in parts": ("language-ddp", {**GPT, **EXPERTS, "workload.capacity": 0.0}),
    "llama": (
        "language-ddp",
        {"workload.model": "transformers", "workload.transformers_config": LLAMA, "workload.context": 32},
    ),
    "resnet": ("vision-ddp", {"workload.depth": 2, "workload.width": 8, "workload.image_size": 16}),
    "vit": ("vision-transformer-ddp", {"workload.width": 32, "workload.image_size": 16, "workload.patch": 4}),
    "driver": ("driving-ddp", {"workload.width": 32, "workload.depth": 6, "workload.episodes": 1}),
}


def experiment(kind: str, layout: dict[str, Any], **changes: Any) -> Experiment:
    name, small = TINY[kind]
    return recipe(name).set(
        small
        | {
            "layout": layout,
            "training.steps": STEPS,
            "training.global_batch": 16,
            "training.evaluate_every": STEPS,
            "training.checkpoint_every": 0,
            "training.gradient_norm": True,
            "optimizer.schedule": "constant",
            "quantization.training": "fp64",
        }
        | changes
    )


def finished(wanted: Experiment, resume: str | None = None) -> RunData:
    run = launch(wanted, baseline=None, **({"resume": resume} if resume else {}))
    run.result(timeout=120)
    return run.data()


@lru_cache
def alone(kind: str) -> RunData:
    return finished(experiment(kind, {}))


def assert_equal(data: RunData, reference: RunData) -> None:
    assert len(data.loss) == len(reference.loss)
    assert np.abs(data.loss - reference.loss).max() <= EXACT
    assert np.abs(data.grad_norm - reference.grad_norm).max() <= EXACT
    (_, _, one), (_, _, other) = data.evaluations[-1], reference.evaluations[-1]
    assert one == pytest.approx(other, abs=EXACT)
    assert data.samples.tolist() == reference.samples.tolist(), "no sample is counted twice"


PIPE = {"pp": 2, "microbatches": 4}
TWO = {"stages_per_rank": 2}
ONE_STAGE = [{"schedule": name} for name in ("naive", "gpipe", "1f1b")]
# With torch 2.13, sharding inside the last three trains silently wrong unless the exchange waits for the schedule.
SPLIT = [{"schedule": name, **TWO} for name in ("interleaved_zero_bubble", "zbv", "dualpipev")]
SCHEDULES = [*ONE_STAGE, *({"schedule": name, **TWO} for name in ("interleaved_1f1b", "looped_bfs")), *SPLIT]
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    *(("gpt", {"dp_shard": ranks, "zero_stage": stage}) for ranks in (2, 4) for stage in (1, 2, 3)),
    ("gpt", {"dp_replicate": 2, "dp_shard": 2}),
    ("gpt", {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 1}),
    ("gpt", {"tp": 2}),
    ("gpt", {"tp": 4, "sequence_parallel": True}),
    ("gpt", {"cp": 2}),
    ("gpt", {"cp": 4}),
    ("gpt", {"cp": 2, "tp": 2, "sequence_parallel": True}),
    ("gpt", {"dp_shard": 2, "cp": 2}),
    *(("gpt", PIPE | one) for one in SCHEDULES),
    *(("gpt", {"pp": 4, "microbatches": 8} | one) for one in SCHEDULES),
    *(("gpt", {**PIPE, "tp": 2} | one) for one in SCHEDULES),
    *(("gpt", {**PIPE, "dp_shard": 2} | one) for one in SPLIT),
    ("gpt", {**PIPE, "dp_replicate": 2}),
    ("gpt", {**PIPE, "cp": 2, "tp": 2, "sequence_parallel": True}),
    ("gpt", {"dp_shard": 2, "tp": 2}),
    ("gpt", {"pp": 2, "microbatches": 2, "tp": 2, "dp_shard": 2, "sequence_parallel": True}),
    ("gpt", {"pp": 2, "microbatches": 2, "tp": 2, "dp_replicate": 2}),
    *(("gpt", {**PIPE, "balance": balance}) for balance in ("parameters", "cost")),
    ("gpt", {**PIPE, "stage_blocks": [1, 7]}),
    *(("gpt", {"dp_replicate": 2, "activation_checkpointing": which}) for which in ("selective", "full")),
    ("gpt", {"dp_shard": 2, "tp": 2, "activation_checkpointing": "selective"}),
    ("gpt", {**PIPE, **TWO, "schedule": "zbv", "activation_checkpointing": "full"}),
    *(("tied gpt", {"dp_shard": 2, "tp": 2, "zero_stage": stage}) for stage in (2, 3)),
    *(("tied gpt", {**PIPE, "dp_shard": 2, "tp": 2, "zero_stage": stage}) for stage in (1, 3)),
    *(("tied gpt", {**PIPE, **TWO, "schedule": "zbv", "dp_shard": 2, "zero_stage": stage}) for stage in (2, 3)),
    ("experts", {"ep": 2}),
    ("experts", {"ep": 2, "dp_replicate": 2}),
    *(("experts", {"ep": 2, "dp_shard": 2, "zero_stage": stage}) for stage in (1, 3)),
    ("experts", {"ep": 2, "tp": 2, "sequence_parallel": True}),
    *(("experts", {**PIPE, "ep": 4} | one) for one in SPLIT),
    ("experts", {**PIPE, "ep": 2, "tp": 2}),
    ("experts in parts", {"ep": 2, "cp": 2}),
    ("llama", {"dp_shard": 4}),
    ("llama", {"tp": 2, "cp": 2}),
    ("llama", {**PIPE, "dp_shard": 2, "tp": 2}),
    ("resnet", {"dp_shard": 2}),
    ("resnet", {"tp": 2, "pp": 2, "microbatches": 2}),
    ("vit", {"cp": 2}),
    ("vit", {"tp": 2, "sequence_parallel": True, "pp": 2, "microbatches": 4}),
    ("vit", {"tp": 2, "sequence_parallel": True, "cp": 2}),
    ("driver", {"dp_shard": 4, "zero_stage": 2}),
    ("driver", {"tp": 2, "pp": 2, **TWO, "microbatches": 4, "schedule": "zbv"}),
]


def cases() -> list[Any]:
    """Return all layouts; where every schedule meets four stages or tensor parallelism, two of them always run."""
    every = {"pp": 4, "microbatches": 8}, {**PIPE, "tp": 2}
    rest = [crossed | one for crossed in every for one in SCHEDULES if one["schedule"] not in ("1f1b", "zbv")]
    return [
        pytest.param(kind, layout, marks=pytest.mark.exhaustive if layout in rest else ()) for kind, layout in LAYOUTS
    ]


@pytest.mark.parametrize(("kind", "layout"), cases(), ids=lambda value: str(value).replace("'", ""))
def test_a_layout_computes_what_one_process_computes(kind: str, layout: dict[str, Any]) -> None:
    assert_equal(finished(experiment(kind, layout)), alone(kind))


@pytest.mark.parametrize("layout", [{"dp_shard": 2, "zero_stage": 2}, {"dp_shard": 2}, {**PIPE, "microbatches": 2}])
def test_passes_and_clipping_keep_it_equal(layout: dict[str, Any]) -> None:
    clipped = {"optimizer.clip_norm": 0.5}
    reference = finished(experiment("gpt", {}, **clipped))
    data = finished(experiment("gpt", layout, **{"gradients.accumulation": 2, "gradients.bucket_mb": 0.05}, **clipped))
    assert_equal(data, reference)
    assert (reference.grad_norm > 0.5).all(), "the bound is felt"


def test_a_checkpoint_goes_on_in_any_other_layout() -> None:
    whole = alone("gpt")
    half = experiment("gpt", {"dp_shard": 2, "tp": 2, "sequence_parallel": True}).set(
        {"training.steps": STEPS // 2, "training.checkpoint_every": STEPS // 2}
    )
    run = launch(half, baseline=None)
    run.result(timeout=120)
    others = {"pp": 2, "microbatches": 2}, {"dp_replicate": 4}, {"dp_shard": 4}, {"dp_shard": 2, "zero_stage": 1}, {}
    for layout in others:
        data = finished(experiment("gpt", layout), resume=run.id)
        assert np.abs(data.loss - whole.loss[STEPS // 2 :]).max() <= EXACT, layout


FOLDED = {"pp": 2, **TWO, "microbatches": 4, "schedule": "zbv", "dp_shard": 2, "zero_stage": 2}


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("gpt", FOLDED, [{"dp_shard": 2}, {"tp": 2}, {}]),
        ("tied gpt", FOLDED, [{"tp": 2}, {"pp": 2, "microbatches": 2, "dp_shard": 2, "zero_stage": 1}, {}]),
        ("experts", {"ep": 2, "tp": 2}, [{"pp": 2, "microbatches": 2, "ep": 2}, {"dp_shard": 2}, {}]),
    ],
)
def test_so_does_that_of_a_pipeline_of_tied_weights_and_of_experts(
    kind: str, before: dict[str, Any], after: list[dict[str, Any]]
) -> None:
    half = experiment(kind, before).set({"training.steps": STEPS // 2, "training.checkpoint_every": STEPS // 2})
    run = launch(half, baseline=None)
    run.result(timeout=120)
    for layout in after:
        data = finished(experiment(kind, layout), resume=run.id)
        assert np.abs(data.loss - alone(kind).loss[STEPS // 2 :]).max() <= EXACT, layout


@pytest.mark.parametrize(
    "layout",
    [
        *({"dp_shard": 2, "zero_stage": stage} for stage in (2, 3)),
        {"tp": 2, "sequence_parallel": True},
        {"cp": 2},
        {**PIPE, **TWO, "schedule": "zbv", "dp_shard": 2},
    ],
)
def test_half_precision_stays_close_to_itself_and_is_on(layout: dict[str, Any]) -> None:
    """Equal in theory only: bfloat16 has eight bits, and sums come in another order."""
    half = {"quantization.training": "bf16"}
    data, reference = finished(experiment("gpt", layout, **half)), finished(experiment("gpt", {}, **half))
    assert data.rank_starts[0]["effective"]["products"] == "bfloat16"
    assert np.abs(data.loss - reference.loss).max() < 0.01
    assert np.abs(reference.loss - alone("gpt").loss).max() > 1e-6, "rounding is felt"


def odd(layout: dict[str, Any], **changes: Any) -> Experiment:
    """A model with frozen weights and running means."""
    path = Path(__file__).with_name("odd_task.py")
    return Experiment().set(
        {
            "workload": {"name": "custom", "path": f"{path}:make"},
            "layout": layout,
            "training.steps": STEPS,
            "training.global_batch": 16,
            "training.evaluate_every": STEPS,
            "training.checkpoint_every": STEPS // 2,
            "quantization.training": "fp64",
            "optimizer.schedule": "constant",
        }
        | changes
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_weights_and_running_means_survive_sharding(stage: int) -> None:
    layout = {"dp_shard": 2, "zero_stage": stage}
    first = launch(odd(layout, **{"training.steps": STEPS // 2, "training.evaluate_every": 0}), baseline=None)
    first.result(timeout=120)
    whole = launch(odd(layout), baseline=None)
    resumed = launch(odd(layout), resume=first.id, baseline=None)
    whole.result(timeout=120), resumed.result(timeout=120)
    assert resumed.data().loss.tolist() == whole.data().loss[STEPS // 2 :].tolist()
    one, other = (load_file(run.directory.checkpoint(STEPS) / "model.safetensors") for run in (whole, resumed))
    assert one["norm.num_batches_tracked"] == STEPS
    assert one["norm.running_mean"].abs().sum() > 0
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_a_closed_loop_of_ones_own_gets_ones_own_model() -> None:
    assert finished(odd({"dp_replicate": 2})).evaluations[-1][2]["own"] == 2 * 7.0


def own(function: str, layout: dict[str, Any]) -> Experiment:
    path = Path(__file__).with_name("chain_task.py")
    return odd(layout, workload={"name": "custom", "path": f"{path}:{function}"}, **{"training.gradient_norm": True})


def test_a_chain_of_ones_own_can_be_cut_into_stages() -> None:
    reference = finished(own("make", {}))
    for layout in (PIPE, {**PIPE, **TWO, "schedule": "zbv", "dp_shard": 2}, {**PIPE, "balance": "cost"}):
        assert_equal(finished(own("make", layout)), reference)


@pytest.mark.parametrize("layout", [PIPE, {**PIPE, **TWO, "schedule": "zbv"}, {**PIPE, "dp_shard": 2}])
def test_a_module_in_two_stages_is_one_module(layout: dict[str, Any]) -> None:
    clip = {"optimizer.clip_norm": 0.1}
    whole = finished(own("shared_module", {}).set(clip))
    half = own("shared_module", layout).set(clip | {"training.steps": STEPS // 2})
    run = launch(half, baseline=None)
    run.result(timeout=120)
    assert np.abs(run.data().grad_norm - whole.grad_norm[: STEPS // 2]).max() <= EXACT
    resumed = finished(own("shared_module", {}).set(clip), resume=run.id)
    assert np.abs(resumed.loss - whole.loss[STEPS // 2 :]).max() <= EXACT


def test_frozen_lower_stages_are_exact_or_refused_with_a_sentence() -> None:
    by_hand = {**PIPE, "stage_blocks": [3, 3]}
    assert_equal(finished(own("lower_frozen", by_hand)), finished(own("lower_frozen", {})))
    nothing = {**PIPE, "stage_blocks": [2, 4]}
    split = {**PIPE, **TWO, "schedule": "zbv", "stage_blocks": [2, 1, 1, 2]}
    for layout, sentence in ((nothing, "stage 0 has nothing to train"), (split, "under zbv the first stage must")):
        run = launch(own("lower_frozen", layout), baseline=None)
        run.wait(60)
        assert run.state == "failed"
        assert sentence in run.cause["message"]


def test_what_is_no_chain_says_so() -> None:
    run = launch(own("unbroken", PIPE), baseline=None)
    run.wait(60)
    assert run.state == "failed"
    assert "chain of blocks (labkit.workloads.base.Blocks)" in run.cause["message"]


@pytest.mark.parametrize("layout", [{"dp_replicate": 2, **PIPE}, {"dp_shard": 2, "tp": 2}])
def test_all_ranks_of_a_spread_model_stop_at_the_same_step_and_go_on(layout: dict[str, Any]) -> None:
    run = launch(experiment("gpt", layout).replace("training.steps=100000", "training.checkpoint_every=null"))
    while not run.data().steps:
        time.sleep(0.05)
    assert run.stop().state == "stopped", run.cause
    data = run.data()
    assert len({len(seconds) for seconds in data.seconds}) == 1
    assert run.checkpoints() == [data.steps]
    more = experiment("gpt", {}).replace(f"training.steps={data.steps + 2}")
    assert finished(more, resume=run.id).steps == 2
