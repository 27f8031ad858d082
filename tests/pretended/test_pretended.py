"""The worker on pretended GPUs: nothing that a GPU would refuse, no wait inside a step that is not explained here."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from labkit.experiment import rules
from tests.pretended.client import PretendedGpus, experiment_of, machine

pytestmark = [pytest.mark.pretended, pytest.mark.alone]

FEW = [
    (1, "quantization.training=bf16 optimizer.state_bits=8"),
    (1, "quantization.training=int8 quantization.after_training=int8_static"),
    (2, "layout=dp2 gradients.compression.method=powersgd quantization.training=bf16"),
    (2, "layout=shard2 layout.zero_stage=3 layout.activation_checkpointing=full"),
    (2, "layout=tp2 layout.sequence_parallel=true sparsity.method=rigl sparsity.target=0.8"),
    (2, "layout=ep2 workload.experts=4 workload.capacity=1.5 workload.balance_loss=0.01"),
    (2, "layout=pp2 layout.microbatches=4 layout.schedule=zbv layout.stages_per_rank=2 workload.depth=4"),
    (4, "layout=dp4 gradients.update.method=gossip gradients.update.graph=ring"),
]
"""First tier."""
LLAMA = (
    '{"model_type":"llama","hidden_size":32,"intermediate_size":64,"num_hidden_layers":2,"num_attention_heads":4,'
    '"num_key_value_heads":2}'
)
PIPELINE = "layout=pp2 layout.microbatches=4 workload.depth=4"
COVERING = [
    (1, ""),
    (1, "quantization.training=fp16 gradients.accumulation=2"),
    (1, "quantization.training=tf32"),
    (1, "quantization.training=fp64 layout.activation_checkpointing=full training.loader_workers=2"),
    (1, "quantization.training=pure_bf16 layout.activation_checkpointing=selective"),
    (1, "quantization.training=bitnet optimizer.name=sgd"),
    (1, "quantization.training=int8_weights"),
    (1, "quantization.after_training=int8_dynamic"),
    (1, "quantization.after_training=int8_weight_only"),
    (1, "quantization.qat=int4 quantization.after_training=int4_weight_only"),
    (1, "sparsity.method=n_m sparsity.export=true quantization.training=bf16"),
    (1, "sparsity.method=structured sparsity.target=0.5 sparsity.export=true"),
    (1, "sparsity.method=block sparsity.target=0.5"),
    (1, "sparsity.method=gradual sparsity.target=0.8 training.gradient_norm=true optimizer.clip_norm=null"),
    (1, "workload.experts=4 workload.capacity=1.5 workload.balance_loss=0.01"),
    (1, f"workload.model=transformers workload.transformers_config={LLAMA}"),
    (1, "workload=vision workload.model=resnet"),
    (1, "workload=vision workload.model=vit"),
    (1, "workload=driving"),
    *[(2, f"layout=dp2 gradients.compression.method={name}") for name in ("fp16", "int8", "sign", "ternary", "topk")],
    *[(2, f"layout=dp2 gradients.compression.method={name}") for name in ("bf16", "randomk", "onebit_adam")],
    *[(2, f"layout=dp2 gradients.update.method={name}") for name in ("local_sgd", "diloco", "streaming_diloco")],
    *[(2, f"layout=dp2 gradients.update.method={name}") for name in ("delayed", "parameter_server", "post_local_sgd")],
    (2, "layout=dp2 gradients.overlap=false gradients.accumulation=2 quantization.training=int8"),
    (2, "layout=shard2 layout.zero_stage=1 quantization.training=bf16"),
    (2, "layout=shard2 layout.zero_stage=2 sparsity.method=rigl sparsity.target=0.8"),
    (2, "layout=shard2 layout.zero_stage=3 layout.cpu_offload=true"),
    (2, "layout=shard2 layout.zero_stage=3 quantization.training=bf16"),
    (2, "layout=tp2 quantization.training=bf16 layout.activation_checkpointing=full"),
    (2, "layout=cp2 quantization.training=bf16"),
    (2, PIPELINE + " layout.schedule=gpipe quantization.training=bf16"),
    (2, PIPELINE + " layout.schedule=1f1b workload.tied=true"),
    (2, PIPELINE + " layout.schedule=interleaved_1f1b layout.stages_per_rank=2"),
    (
        2,
        PIPELINE + " layout.schedule=looped_bfs layout.stages_per_rank=2 sparsity.method=magnitude sparsity.target=0.5",
    ),
    (2, PIPELINE + " layout.schedule=interleaved_zero_bubble layout.stages_per_rank=2"),
    (2, PIPELINE + " layout.schedule=dualpipev layout.stages_per_rank=2"),
    (2, PIPELINE + " layout.schedule=pipedream"),
    (4, "layout=dp2·tp2 gradients.compression.method=topk"),
    (4, "layout=dp2·pp2 layout.microbatches=2 workload.depth=4"),
    (4, "layout=dp2·shard2 layout.zero_stage=3"),
    (4, "layout=shard2·tp2 layout.zero_stage=1"),
    (4, "layout=cp2·shard2 layout.zero_stage=2"),
    (4, "layout=ep2·tp2 workload.experts=4"),
    (8, "layout=dp2·tp2·pp2 layout.microbatches=2 workload.depth=4"),
    (8, "layout=shard2·cp2·tp2 layout.zero_stage=3"),
    # Ranks that share a GPU, over gloo.
    (1, "layout=dp2"),
    (1, "layout=shard2 layout.zero_stage=3"),
    (1, "layout=tp2"),
    (1, "layout=ep2 workload.experts=4"),
    (1, "layout=dp2 gradients.update.method=parameter_server"),
]
"""Second tier: every axis, schedule, method and format."""

EXPLAINED = {
    r"sparsity/|parallel/entries\.py": "masks change in this step: whether all ranks agree is compared on the host",
    r"quantization/(linear|optimizers)\.py": "steps that are looked at count what was rounded",
    r"workloads/models/experts\.py:\d+ |parallel/expert\.py": "the tokens of each expert decide the shapes of products",
    r"gradients/compression/(topk|randomk)\.py": "how many entries a rank sends decides the shape of its message",
    r"gradients/compression/frozen_adamw\.py": "a weight whose gradients were all zero so far is looked at again",
    r"gradients/updates/": "the rule sends over the host: weights, or how far each rank is",
    r"cpu_offload": "the state is in the host's memory",
}
"""Waits that stay, by the lines of code they are at, and why."""


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PretendedGpus]:
    with PretendedGpus(tmp_path_factory.mktemp("pretended")) as started:
        yield started


def case_id(value: object) -> str:
    return str(value).replace("layout.", "").replace("quantization.", "") or "plain"


@pytest.mark.parametrize(("count", "changes"), FEW, ids=case_id)
def test_a_run_does_nothing_that_a_gpu_refuses(gpus: PretendedGpus, count: int, changes: str) -> None:
    learns_without_findings(gpus, count, changes)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "changes"), COVERING, ids=case_id)
def test_neither_does_any_layout_method_or_format(gpus: PretendedGpus, count: int, changes: str) -> None:
    learns_without_findings(gpus, count, changes)


def learns_without_findings(gpus: PretendedGpus, count: int, changes: str) -> None:
    experiment = experiment_of(count, changes)
    assert rules.problems(experiment, machine(count)) == []
    report = gpus.run(count, experiment)
    assert not any(report.errors), report.errors
    assert report.faults == []
    assert report.steps > 0, "no step was watched"
    waits = {text: count for text, count in report.waits.items() if not explained(text, changes)}
    assert waits == {}
    assert len(report.losses) >= 8


def explained(text: str, changes: str) -> bool:
    where = text.rpartition(" at ")[2].replace(" < ", " ") + " " + changes
    return any(re.search(pattern, where) for pattern in EXPLAINED)


LARGE = "workload.width=128 workload.depth=8 optimizer.name=sgd"
"""A model of 6.6 MB, which trains where a GPU of 6 MB needs to hold no more than its own part."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (8, f"{LARGE} layout=shard8 layout.zero_stage=3"),
        (8, f"{LARGE} layout=tp4·pp2 layout.microbatches=2 layout.balance=cost"),
    ],
    ids=case_id,
)
def test_a_model_trains_that_no_gpu_can_hold(gpus: PretendedGpus, count: int, changes: str) -> None:
    report = gpus.run(count, experiment_of(count, changes), "card_of_6_mb")
    assert report.errors == [""] * count
    assert report.faults == []
    assert len(report.losses) >= 8


def test_the_small_gpu_does_not_hold_it(gpus: PretendedGpus) -> None:
    report = gpus.run(1, experiment_of(1, LARGE), "card_of_6_mb")
    assert "OutOfMemoryError" in report.errors[0]


# -- the harness finds what is planted --------------------------------------------------------------------------------

PLANTED = [
    (1, "", "batches_that_stay_on_the_host", r"has inputs on both devices \(.*cpu.*\) at workloads/"),
    (2, "layout=dp2", "message_of_the_host", r"allreduce: NCCL does not take a tensor of the host \(\[3\]\)"),
    (1, PIPELINE, "nothing", r"send: gloo does not send a tensor of the GPU .* at parallel/pipeline\.py"),
    (
        1,
        "",
        "memory_that_grows",
        r"memory of the GPU grows with every step, from \d+ to \d+ bytes, at training/trainer",
    ),
    (
        2,
        "layout=dp2",
        "collectives_in_another_order",
        r"rank 0 sends broadcast of 2 float32 at training/trainer\.py:\d+.*, rank 1 allreduce of 2 float32",
    ),
    (
        2,
        "layout=dp2",
        "ring_that_is_not_batched",
        r"rank 0 at training/trainer\.py.* and rank 1 at .* wait for each other: NCCL takes unbatched messages",
    ),
]


@pytest.mark.parametrize(("count", "changes", "plant", "expected"), PLANTED, ids=[plant for _, _, plant, _ in PLANTED])
def test_a_planted_fault_is_found_with_its_line(
    gpus: PretendedGpus, count: int, changes: str, plant: str, expected: str
) -> None:
    report = gpus.run(count, experiment_of(count, changes), plant, deadline_s=8)
    assert any(re.search(expected, fault) for fault in report.faults), (report.errors, report.faults)


def test_a_planted_wait_is_found_with_its_line(gpus: PretendedGpus) -> None:
    report = gpus.run(1, experiment_of(1, ""), "norm_that_is_read")
    [(text, per_step)] = report.waits.items()
    assert text.startswith("a number is read (item) at training/trainer.py:")
    assert per_step == 1.0


def test_numbers_are_those_of_the_cpu(gpus: PretendedGpus) -> None:
    on_gpu = gpus.run(1, experiment_of(1, ""))
    on_cpu = gpus.run(1, experiment_of(1, "launch.device=cpu"))
    assert on_gpu.losses == on_cpu.losses
    assert on_cpu.waits == {}
