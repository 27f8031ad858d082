"""The traced update: what real ranks write of their memory, traffic, pipeline and experts, beside what must be."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from labkit.experiment import Experiment, Layout
from labkit.experiment.memory import STATES, model_state_bytes
from labkit.experiment.recipes import recipe
from labkit.launch import launch
from labkit.runs import Run
from labkit.runs.data import RunData
from labkit.training.probes.activations import Activations

DEPTH, WIDTH, CONTEXT, BATCH = 4, 32, 32, 16
FLOAT = 4
TENSORS = 2 + 16 * DEPTH + 3
"""Parameters of the model. Ranks tell each other in a byte each which of them an update has used."""
WITHIN = 0.03


def experiment(layout: dict[str, Any], **changes: Any) -> Experiment:
    return recipe("language-ddp").set(
        {
            "workload.depth": DEPTH,
            "workload.width": WIDTH,
            "workload.context": CONTEXT,
            "layout": layout,
            "training.steps": 5,
            "training.global_batch": BATCH,
            "training.evaluate_every": 0,
            "training.checkpoint_every": 0,
            "optimizer.clip_norm": None,
        }
        | changes
    )


def finished(layout: dict[str, Any], **changes: Any) -> Run:
    run = launch(experiment(layout, **changes), baseline=None)
    run.result(timeout=120)
    return run


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "layout",
    [{}, {"dp_replicate": 2}, *({"dp_shard": 2, "zero_stage": stage} for stage in (1, 2, 3))],
    ids=["whole", "replicas", "stage 1", "stage 2", "stage 3"],
)
def test_model_state_is_what_the_formula_says(layout: dict[str, Any], passes: int) -> None:
    run = finished(layout, **{"gradients.accumulation": passes})
    memory = run.summary()["memory"]
    assert memory["step"] == 4
    whole = run.summary()["parameters"] * FLOAT
    for measured, formula in zip(memory["measured"], memory["formula"], strict=True):
        assert formula == model_state_bytes(run.experiment, whole, whole)
        for kind in STATES:
            assert measured[kind] == pytest.approx(formula[kind], rel=WITHIN), kind
        assert measured["activations"] > 0


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2, "microbatches": 2}, {"tp": 2, "dp_shard": 2}])
def test_a_part_of_the_model_has_the_formula_of_its_part(layout: dict[str, Any]) -> None:
    run = finished(layout)
    memory = run.summary()["memory"]
    for measured, formula in zip(memory["measured"], memory["formula"], strict=True):
        for kind in STATES:
            assert measured[kind] == pytest.approx(formula[kind], rel=WITHIN), kind
    held = sum(formula["parameters"] for formula in memory["formula"])
    assert held >= run.summary()["parameters"] * FLOAT, "nothing is missing"


def test_the_formulas_of_zero() -> None:
    wanted = {1: (100, 80, 40), 2: (100, 20, 40), 3: (25, 20, 40)}
    for stage, sizes in wanted.items():
        one = Experiment().set({"layout": {"dp_shard": 4, "zero_stage": stage}})
        assert tuple(model_state_bytes(one, 100, 80).values()) == sizes
    sgd = Experiment().replace("optimizer.name=sgd")
    assert model_state_bytes(sgd, 100, 80)["optimizer"] == 80
    assert model_state_bytes(sgd.replace("optimizer.momentum=0"), 100, 80)["optimizer"] == 0


def test_a_storage_counts_once_and_parameters_do_not() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    with Activations([model]) as count:
        loss = model(x).square().sum()
        inputs, hidden, out = 5 * 8 * FLOAT, 5 * 16 * FLOAT, 5 * 4 * FLOAT  # tanh's output is the next layer's input
        assert count.peak == inputs + hidden + out
        loss.backward()
        assert not count._current, "the backward pass lets everything go"
    assert model(x).square().sum().requires_grad
    assert count.peak == inputs + hidden + out, "closed: it counts no more"


def test_what_is_computed_again_counts_while_it_lives() -> None:
    model = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(6))

    def largest(again: bool) -> int:
        x = torch.randn(32, 64, requires_grad=True)
        with Activations([model]) as count:
            for part in model:
                x = checkpoint(part, x, use_reentrant=False) if again else part(x)
            x.sum().backward()
            assert not count._current
        return count.peak

    one = 32 * 64 * FLOAT
    assert largest(False) == 3 * 6 * one  # of each part its input, the input of GELU and its output
    assert largest(True) == 6 * one + 2 * one, "the input of each part, and inside of one part at a time the rest"


@pytest.mark.parametrize("stage", [1, 3])
def test_selective_checkpointing_lies_between_none_and_full(stage: int) -> None:
    peaks = [peak(which, stage) for which in ("none", "selective", "full")]
    assert peaks[0] > 1.2 * peaks[1] > 1.2 * 1.2 * peaks[2]


@pytest.mark.parametrize("which", ["none", "selective", "full"])
def test_gathered_parameters_are_no_activations(which: str) -> None:
    assert peak(which, stage=3) == peak(which, stage=1)


@lru_cache
def peak(which: str, stage: int) -> int:
    run = finished({"dp_shard": 2, "zero_stage": stage, "activation_checkpointing": which})
    return int(run.summary()["memory"]["measured"][0]["activations"])


# -- traffic ----------------------------------------------------------------------------------------------------------


def axes(run: Run) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = run.summary()["communication"]["axes"]
    return found


STREAM = BATCH * CONTEXT * WIDTH * FLOAT
LOSS = 3 * BATCH * CONTEXT * FLOAT
"""Of every token's scores, which no rank has whole, three numbers travel, in two sums."""


def test_tensor_parallelism_sends_what_megatron_says() -> None:
    sums = 4 * DEPTH + 2  # two a layer forward, two backward; one after the embedding, one before the scores
    run = finished({"tp": 2})
    found = axes(run)["tp"]
    assert found["bytes"] == sums * STREAM + LOSS
    assert found["calls"] == sums + 2
    assert found["wire_bytes"] == found["bytes"], "2·(n-1)/n is 1 for two ranks"
    assert 0 < found["exposed_seconds"] < sum(run.data().seconds[0])
    assert run.summary()["communication"]["bytes_per_step"] == found["bytes"]


def test_sequence_parallelism_sends_the_same_in_halves() -> None:
    run = finished({"tp": 2, "sequence_parallel": True})
    # Each sum becomes a reduce-scatter, which takes the whole, and a gathering, which hands over half.
    scattered = gathered = 4 * DEPTH + 2
    norms, rows, positions = WIDTH * (4 * DEPTH + 2), WIDTH * 2 * DEPTH, WIDTH * CONTEXT  # see a part of the tokens
    expected = scattered * STREAM + gathered * STREAM // 2 + LOSS + (norms + rows + positions) * FLOAT
    assert axes(run)["tp"]["bytes"] == expected


def test_a_ring_sends_keys_and_values_round_and_their_gradients_home() -> None:
    run = finished({"cp": 2})
    block = 2 * STREAM // 2  # keys and values of half of the sequence
    gradients = run.summary()["parameters"] * FLOAT
    assert axes(run)["cp"]["bytes"] == DEPTH * (1 + 1 + 2) * block + gradients + TENSORS


def test_experts_send_tokens_there_and_back() -> None:
    run = finished({"ep": 2}, **{"workload.experts": 4})
    choices = BATCH // 2 * CONTEXT * 2 * WIDTH * FLOAT  # of this rank's tokens, two experts each
    there_and_back = sum(axis["bytes"] for axis in run.data().traffic[0].values())
    assert there_and_back > 2 * DEPTH * choices, "out and, as gradients, back"
    assert "ep" in axes(run)


def test_a_pipeline_sends_every_microbatch_once_each_way() -> None:
    microbatches = 4
    run = finished({"pp": 2, "microbatches": microbatches})
    sent = microbatches * (BATCH // microbatches) * CONTEXT * WIDTH * FLOAT
    for rank in (0, 1):
        counts = run.data().traffic[rank]["pp"]
        assert counts["bytes"] == counts["wire_bytes"] == sent
        assert counts["calls"] == 2 * microbatches


@pytest.mark.parametrize(("stage", "handed", "calls"), [(1, 1.5, 2), (2, 1.5, 2), (3, 2.0, None)])
def test_zero_sends_a_reduce_scatter_and_its_gatherings(stage: int, handed: float, calls: int | None) -> None:
    run = finished({"dp_shard": 2, "zero_stage": stage}, **{"gradients.bucket_mb": 1000})
    whole = run.summary()["parameters"] * FLOAT
    found = axes(run)["dp_shard"]
    # The whole gradient goes in, an own half is gathered: once after the update, at stage 3 forward and backward.
    assert found["bytes"] == pytest.approx(handed * whole, rel=0.01)
    if calls:
        assert found["calls"] == 2 * calls + 1, "buckets with and without weight decay, and what was used"


def test_ddp_tells_its_buckets() -> None:
    run = finished({"dp_replicate": 2})
    found = axes(run)
    assert list(found) == ["dp_replicate"]
    assert found["dp_replicate"]["bytes"] == run.summary()["parameters"] * FLOAT
    assert found["dp_replicate"]["calls"] >= 1


def test_products_of_axes_are_named() -> None:
    found = axes(finished({"dp_replicate": 2, "tp": 2}))
    assert set(found) == {"dp_replicate", "tp"}
    found = axes(finished({"dp_replicate": 2, "dp_shard": 2, "zero_stage": 1}, **{"optimizer.clip_norm": 1.0}))
    assert set(found) == {"dp_replicate", "dp_shard", "dp_replicate+dp_shard"}


# -- the pipeline's timeline ------------------------------------------------------------------------------------------

SCHEDULES = [
    ("naive", 1, "FB"),
    ("gpipe", 1, "FB"),
    ("1f1b", 1, "FB"),
    ("interleaved_1f1b", 2, "FB"),
    ("looped_bfs", 2, "FB"),
    ("interleaved_zero_bubble", 2, "FIW"),
    ("zbv", 2, "FBIW"),
    ("dualpipev", 2, "FBIW"),
]


@pytest.mark.parametrize(("schedule", "stages", "kinds"), SCHEDULES)
def test_every_schedule_computes_every_chunk_once(schedule: str, stages: int, kinds: str) -> None:
    layout = {"pp": 2, "microbatches": 4, "schedule": schedule, "stages_per_rank": stages}
    run = finished(layout)
    data, microbatches = run.data(), 1 if schedule == "naive" else 4
    every = {(stage, number) for stage in range(2 * stages) for number in range(microbatches)}
    actions = [action for rank in data.timeline.values() for action in rank]
    assert {action.kind for action in actions} <= set(kinds)
    forward = [(action.stage, action.microbatch) for action in actions if action.kind == "F"]
    assert sorted(forward) == sorted(every), "each once"
    backward = [(action.stage, action.microbatch) for action in actions if action.kind in "BI"]
    assert sorted(backward) == sorted(every), "each once"
    halves = [[(a.stage, a.microbatch) for a in actions if a.kind == kind] for kind in "IW"]
    assert sorted(halves[0]) == sorted(halves[1]), "what was put off is made up for"
    for row in data.timeline.values():
        assert all(one.end <= other.begin for one, other in itertools.pairwise(row)), "one thing at a time"
    bubble = run.summary()["bubble"]
    assert 0 <= bubble["own"] <= bubble["measured"] + 0.05 < 1.05
    assert bubble["own_seconds"] <= bubble["measured_seconds"] * 1.05


def test_passes_are_counted_on() -> None:
    data = finished({"pp": 2, "microbatches": 2}, **{"gradients.accumulation": 2}).data()
    assert sorted(a.microbatch for a in data.timeline[0] if a.kind == "F") == [0, 1, 2, 3]


# -- the trace itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        {"dp_replicate": 2},
        {"dp_shard": 2, "activation_checkpointing": "selective"},
        {"dp_shard": 2},
        {"tp": 2},
        {"pp": 2, "microbatches": 4, "schedule": "zbv", "stages_per_rank": 2, "dp_shard": 2},
    ],
    ids=str,
)
def test_tracing_changes_no_number(layout: dict[str, Any]) -> None:
    more = {"training.gradient_norm": True}
    traced, plain = (finished(layout, **more, **{"training.trace_step": step}).data() for step in (3, 0))
    assert traced.loss.tolist() == plain.loss.tolist()
    assert traced.grad_norm.tolist() == plain.grad_norm.tolist()
    assert traced.traced == 3
    assert plain.traced is None
    assert not plain.memory
    assert traced.skipped_lines == plain.skipped_lines == 0


def test_a_short_run_traces_its_last_update() -> None:
    assert finished({}, **{"training.steps": 2}).data().traced == 2


def test_a_resumed_run_counts_from_its_own_start() -> None:
    first = finished({}, **{"training.steps": 2, "training.checkpoint_every": 2})
    run = launch(experiment({}), resume=first.id, baseline=None)
    run.result(timeout=120)
    assert run.data().traced == 5, "three updates are left, fewer than four"


# -- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", [{}, {"dp_replicate": 2}, {"pp": 2, "microbatches": 2}, {"tp": 2}, {"cp": 2}, {"ep": 2}], ids=str
)
def test_every_choice_of_every_token_is_counted(layout: dict[str, Any]) -> None:
    run = finished(layout, **{"workload.experts": 4})
    experts = run.data().experts
    assert sorted(experts) == [f"layer_{number}" for number in range(DEPTH)]
    choices = BATCH * CONTEXT * run.experiment.workload.options["experts_per_token"]
    assert {int(load.sum()) for load in experts.values()} == {choices}
    for shares in run.summary()["experts"].values():
        assert sum(shares) == pytest.approx(1)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_made_up_trace_is_read_with_care(tmp_path: Any) -> None:
    import json

    from labkit.experiment.run_directory import RunDirectory

    directory = RunDirectory(tmp_path)
    good = {"parameters": 1, "gradients": 2, "optimizer": 3.5, "activations": 4}
    lines: list[Any] = [
        {"step": 0, "memory": good, "formula": good},
        {"step": 4, "memory": [1], "formula": good},
        {
            "step": 4,
            "memory": good | {"parameters": -5, "secret": 9, "gradients": 1e400},
            "formula": {},
            "traffic": {
                "tp": {"calls": 1, "bytes": 2, "wire_bytes": 3, "exposed_seconds": 0.5},
                "<b>": {"calls": 1, "bytes": 2, "wire_bytes": 3, "exposed_seconds": 0.5},
                "pp": {"calls": "many"},
                "cp": 7,
            },
            "timeline": [["F", 0, 0, 1.0, 2.0], ["X", 0, 0, 1, 2], ["F", -1, 0, 1, 2], ["F", 0, 0, 3, 2], 5, ["F"] * 9],
            "experts": {"layer_0": [1, 2], "layer_1": [1, "two"], "layer_2": [], "layer_3": 3},
        },
        {"step": 5, "memory": good, "formula": good},
    ]
    text = "".join(json.dumps({"event": "trace", **line}).replace("Infinity", "null") + "\n" for line in lines)
    directory.events(0).write_text(text)
    data = RunData(directory)
    data.refresh()
    assert data.skipped_lines == 3, "no step, no memory, and a second trace"
    assert data.memory == {0: {"optimizer": 4, "activations": 4}}
    assert list(data.traffic[0]) == ["tp"]
    assert [tuple(action) for action in data.timeline[0]] == [("F", 0, 0, 1.0, 2.0)]
    assert {name: load.tolist() for name, load in data.experts.items()} == {"layer_0": [1, 2]}


def test_a_part_of_a_pipeline_has_no_bubble() -> None:
    from labkit.runs.pipeline import Action, first_pipeline

    layout = Layout.parse("dp2·pp2")
    rows = {rank: [Action("F", 0, 0, 0.0, 1.0)] for rank in range(4)}
    assert sorted(first_pipeline(rows, layout)) == [0, 2], "those that differ from rank 0 along pp alone"
    assert np.isfinite([action.seconds for action in rows[0]]).all()
