"""Whole runs with compressed gradients: what is installed, what is sent, what it is equal to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labkit.experiment import Experiment
from labkit.experiment.registry import registry
from labkit.proofs.parity import check
from labkit.runs import Run
from tests.launch.helpers import changed_ranks, events, start, tiny

KEYS = [key for key in registry("gradients.compression").names() if key != "none"]
BEGUN = {
    "sign": {"start_step": 1},
    "ternary": {"start_step": 1},
    "topk": {"start_step": 1, "warmup_steps": 2, "ratio": 0.01},
    "randomk": {"start_step": 0, "ratio": 0.1},
    "powersgd": {"start_step": 2, "min_saving": 1.0, "rank": 4},
    "onebit_adam": {"warmup_steps": 2},
}
"""So early, and with so little sent, that the runs of these tests show it."""
STEPS = 5
ODD = Path(__file__).parents[1] / "training" / "odd_task.py"
GPT = {"name": "language", "width": 16, "depth": 2, "heads": 2, "context": 16, "max_characters": 20_000}


def compressed(key: str, ranks: int = 2, steps: int = STEPS, **changes: Any) -> Experiment:
    method, options = {"method": key} | BEGUN.get(key, {}), changes.pop("options", {})
    return tiny(ranks, steps, gradients__compression=method | options, **changes)


@lru_cache
def finished(key: str, ranks: int = 2, bucket_mb: float = 0.004) -> Run:
    run = start(compressed(key, ranks, gradients__bucket_mb=bucket_mb))
    run.result(timeout=120)
    return run


@lru_cache
def plain(steps: int = STEPS, transport: str = "network") -> Run:
    run = start(tiny(2, steps, launch__transport=transport, gradients__bucket_mb=0.004))
    run.result(timeout=120)
    return run


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("key", KEYS)
def test_it_is_on_and_sends_what_its_formula_says(key: str, ranks: int) -> None:
    run = finished(key, ranks)
    found = run.summary()["communication"]
    assert found["counted_bytes_per_step"] == found["formula_bytes_per_step"]
    assert found["method"] == run.summary()["effective"]["compressor"] == key
    assert run.summary()["effective"]["exchange"] == "process group"
    assert found["axes"]["dp_replicate"]["calls"] > 1, "several buckets"
    assert found["compression_seconds"] > 0
    columns = run.data().exchanged
    assert columns["bytes"].sum() == STEPS * found["counted_bytes_per_step"]
    whole = 2 * (ranks - 1) * 4 * run.data().rank_starts[0]["parameters"] / ranks
    assert columns["bytes"][-1] < 0.75 * whole, "gathered or not, four ranks send less than without it"
    assert np.isfinite(columns["exposed"]).all()


def test_one_bucket_sends_the_closed_formula() -> None:
    """Written out once more, for two ranks (a sum then sends what it adds up, a gathering its own part)."""
    start_event = plain().data().rank_starts[0]
    n, shapes = start_event["parameters"], _shapes()
    assert sum(int(np.prod(shape)) for shape in shapes) == n
    matrices = [(shape[0], int(np.prod(shape[1:]))) for shape in shapes if len(shape) > 1]
    factored = [(m, k) for m, k in matrices if m * k >= min(4, m, k) * (m + k)]
    vectors = n - sum(m * k for m, k in factored)
    expected = {
        "fp16": 2 * n,
        "bf16": 2 * n,
        "int8": n + 4,
        "sign": -(-n // 8) + 4 * len(shapes),
        "ternary": -(-n // 4) + 4 * len(shapes),
        "topk": 8 * -(-n // 100),
        "randomk": 4 * -(-n // 10),
        "powersgd": 4 * (vectors + sum(min(4, m, k) * (m + k) for m, k in factored)),
        "onebit_adam": 2 * (chunks := -(-n // 2048)) * (4 + -(-n // (16 * chunks))),
    }
    assert set(expected) == set(KEYS)
    for key, size in expected.items():
        assert finished(key, bucket_mb=25.0).data().exchanged["bytes"][-1] == size, key


def _shapes() -> list[tuple[int, ...]]:
    from labkit.workloads.vision import Vision

    experiment = tiny(2, 1)
    task = Vision.build(Vision.Options(**experiment.workload.options), 0)
    return [tuple(parameter.shape) for parameter in task.model.parameters()]


def test_without_a_compressor_bytes_are_those_of_the_formula_and_more() -> None:
    found = plain().summary()["communication"]
    assert found["method"] == "none"
    assert found["counted_bytes_per_step"] == found["formula_bytes_per_step"] == found["bytes_per_step"]
    assert all(found["bytes_per_step"] > finished(key).data().exchanged["bytes"][-1] for key in KEYS)


# -- equal to what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "options", "tolerance"),
    [
        ("topk", {"ratio": 1.0, "freeze": False}, 1e-12),
        ("randomk", {"ratio": 1.0, "freeze": False}, 1e-12),
        ("powersgd", {"rank": 4096, "min_saving": 0.0, "start_step": 0}, 1e-9),
        ("int8", {"levels": 32767}, 1e-2),
        ("fp16", {}, 1e-2),
        ("fp16", {"sum_in": "fp32"}, 1e-2),
        ("bf16", {}, 5e-2),
    ],
)
def test_the_limit_is_plain_training(key: str, options: dict[str, Any], tolerance: float) -> None:
    run = start(compressed(key, options=options, quantization__training="fp64"))
    run.result(timeout=120)
    other = start(tiny(2, STEPS, launch__transport="network", quantization__training="fp64"))
    other.result(timeout=120)
    assert np.abs(run.data().loss - other.data().loss).max() <= tolerance


@pytest.mark.parametrize(("start_step", "momentum"), [(STEPS, 0.9), (0, 0.0)])
def test_momentum_in_the_compressor_is_that_of_sgd(start_step: int, momentum: float) -> None:
    """Until it begins; then, as everything is sent here, a velocity is forgotten after one update."""
    sgd: dict[str, Any] = {"optimizer__name": "sgd", "optimizer__lr": 0.05, "optimizer__weight_decay": 0.0}
    sgd["quantization__training"] = "fp64"
    options = {"ratio": 1.0, "momentum_correction": True, "start_step": start_step}
    run = start(compressed("topk", options=options, **sgd))
    other = start(tiny(2, STEPS, **sgd | {"optimizer__momentum": momentum}))
    run.result(timeout=120)
    other.result(timeout=120)
    assert np.abs(run.data().loss - other.data().loss).max() < 1e-10


def test_the_warm_up_of_one_bit_adam_is_adam() -> None:
    run = start(compressed("onebit_adam", options={"warmup_steps": 3}))
    run.result(timeout=120)
    loss, other = run.data().loss, plain().data().loss
    assert np.abs(loss[:4] - other[:4]).max() < 1e-6, "the fourth loss is that after three updates"
    assert abs(loss[4] - other[4]) > 1e-6


@pytest.mark.parametrize("changes", [{"gradients__overlap": False}, {"gradients__accumulation": 2}])
@pytest.mark.parametrize("key", ["none", "topk", "powersgd"])
def test_when_buckets_are_sent_does_not_matter(key: str, changes: dict[str, Any]) -> None:
    changes = {"gradients__bucket_mb": 0.004, "launch__transport": "network"} | changes
    experiment = tiny(2, STEPS, **changes) if key == "none" else compressed(key, **changes)
    run = start(experiment)
    run.result(timeout=120)
    other = plain() if key == "none" else finished(key)
    assert np.abs(run.data().loss - other.data().loss).max() < (1e-2 if key == "topk" else 1e-4)
    assert (run.data().exchanged["bytes"] == other.data().exchanged["bytes"]).all(), "only the last pass exchanges"


def test_exchange_after_the_backward_pass_keeps_parity() -> None:
    found = check(tiny(2, gradients__overlap=False, launch__transport="network"), steps=4, precisions=("fp64",))
    assert found["parity"] is True


def test_clipping_sees_the_gradient_that_has_arrived() -> None:
    limit = 0.05
    run = start(compressed("int8", optimizer__name="sgd", optimizer__lr=0.1, optimizer__clip_norm=limit))
    run.result(timeout=120)
    norms = run.data().grad_norm
    assert (norms > limit).all()
    assert np.abs(norms - start(tiny(2, STEPS, **_clipped(limit))).wait(120).data().grad_norm).max() < 0.1 * norms.max()


def _clipped(limit: float) -> dict[str, Any]:
    return {"optimizer__name": "sgd", "optimizer__lr": 0.1, "optimizer__clip_norm": limit}


@pytest.mark.parametrize("key", ["sign", "onebit_adam"])
def test_frozen_weights_stay_out_of_it(key: str) -> None:
    run = start(compressed(key, workload={"name": "custom", "path": f"{ODD}:make"}))
    run.result(timeout=120)
    found = run.summary()["communication"]
    assert found["counted_bytes_per_step"] == found["formula_bytes_per_step"] > 0


def test_powersgd_bears_buckets_of_single_parameters() -> None:
    options = {"start_step": 0, "min_saving": 0.0, "rank": 2}
    run = start(compressed("powersgd", steps=60, options=options, gradients__bucket_mb=1e-6))
    run.result(timeout=120)
    assert run.data().steps == 60
    assert run.summary()["communication"]["axes"]["dp_replicate"]["calls"] >= len(_shapes())


def _in_two_parts(key: str, options: dict[str, Any]) -> tuple[Run, Run]:
    """Eight updates at once, and the last four of them after a resume."""
    changes = {"training__checkpoint_every": 4, "optimizer__schedule": "constant", "options": options}
    whole, half = compressed(key, steps=8, **changes), compressed(key, steps=4, **changes)
    first, parts = start(whole), start(half)
    parts.result(timeout=120)
    second = start(whole, resume=parts)
    second.result(timeout=120)
    first.result(timeout=120)
    return first, second


def test_a_resumed_run_knows_how_far_the_training_is() -> None:
    first, second = _in_two_parts("topk", {"start_step": 2, "warmup_steps": 6})
    sent = first.data().exchanged["bytes"]
    assert sent[0] > sent[3] > sent[5] > sent[6] == sent[7]
    assert second.data().first == 4
    assert (second.data().exchanged["bytes"] == sent[4:]).all()


def test_one_bit_adam_goes_on_from_its_checkpoint_frozen() -> None:
    first, second = _in_two_parts("onebit_adam", {"warmup_steps": 2})
    assert second.data().loss[0] == pytest.approx(first.data().loss[4], abs=1e-6)
    early, late = (
        load_file(run.directory.checkpoint(step) / "optimizer.safetensors") for run, step in ((first, 4), (second, 8))
    )
    for name, value in late.items():
        same = torch.equal(value, early[name])
        assert same == name.endswith("exp_avg_sq"), "mean squares stay, momentum and number of updates go on"
    assert {int(value) for name, value in late.items() if name.endswith(".step")} == {8}


# -- with other axes --------------------------------------------------------------------------------------------------

TELL = """
import hashlib
from labkit.training.reporter import Reporter
write = Reporter.write_figures
def tell(self, first, done):
    found = {}
    for module in self.setup.model.stages.values():
        for name, parameter in module.named_parameters():
            found[name] = hashlib.sha256(parameter.detach().contiguous().numpy().tobytes()).hexdigest()
    cut = [name for name, spec in self.setup.model.shard_specs.items() if spec.shard_dims]
    self.events.write("weights", place=self.setup.runtime.mesh.coordinates, digests=found, cut=cut)
    write(self, first, done)
Reporter.write_figures = tell
"""


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with changed_ranks(tmp_path_factory.mktemp("telling")):
        yield


@pytest.mark.parametrize("key", ["int8", "topk"])
@pytest.mark.parametrize(
    "layout",
    [
        {"dp_replicate": 4},
        {"dp_replicate": 2, "tp": 2},
        {"dp_replicate": 2, "tp": 2, "sequence_parallel": True},
        {"dp_replicate": 2, "pp": 2, "microbatches": 2},
        {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 1},
        {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 2},
        {"dp_replicate": 2, "cp": 2},
    ],
    ids=lambda layout: "·".join(f"{axis}{size}" for axis, size in layout.items()),
)
def test_replicas_stay_equal(telling: None, layout: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_TEST_CHANGE", TELL)
    experiment = compressed(key, workload=GPT, layout=layout, training__global_batch=16, gradients__accumulation=2)
    run = start(experiment.replace("gradients.bucket_mb=0.004"))
    run.result(timeout=120)
    told = [event for rank in range(4) for event in events(run, rank) if event["event"] == "weights"]
    assert len(told) == 4
    for one in told:
        for other in told:
            if one["place"]["pp"] == other["place"]["pp"]:
                held = set(one["digests"]) - (set(one["cut"]) if one["place"]["tp"] != other["place"]["tp"] else set())
                assert held
                assert {name: one["digests"][name] for name in held} == {name: other["digests"][name] for name in held}
    found = run.summary()["communication"]
    assert found["counted_bytes_per_step"] == found["formula_bytes_per_step"] > 0
    assert found["method"] == key
    losses = run.data().loss
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("key", ["sign", "ternary", "randomk", "powersgd", "onebit_adam", "bf16"])
def test_the_wire_counts_what_the_trace_sees(key: str) -> None:
    layout = {"dp_replicate": 2, "tp": 2}
    run = start(compressed(key, workload=GPT, layout=layout, training__trace_step=4, training__global_batch=16))
    run.result(timeout=120)
    seen = run.summary()["communication"]["axes"]["dp_replicate"]["wire_bytes"]
    assert seen == run.data().exchanged["bytes"][3], "what left through torch's process groups in the fourth update"
