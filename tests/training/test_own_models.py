"""Other people's models: every layout computes what a hand-written loop of plain PyTorch does, in float64."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labkit.experiment import Experiment
from labkit.experiment.registry import registry
from labkit.launch import launch
from labkit.runs.run import Run
from labkit.workloads.seed import seeded
from tests.training import own_tasks
from tests.training.by_hand import SEED, Loop, loop

EXACT = 1e-9
STEPS, BATCH = 6, 12
TASKS = Path(own_tasks.__file__)


def experiment(name: str, layout: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    return Experiment().set(
        {
            "workload": {"name": "custom", "path": f"{TASKS}:{name}"},
            "layout": layout or {},
            "training.steps": STEPS,
            "training.global_batch": BATCH,
            "training.seed": SEED,
            "training.evaluate_every": STEPS,
            "training.checkpoint_every": STEPS,
            "training.gradient_norm": True,
            "optimizer.lr": 0.02,
            "optimizer.schedule": "constant",
            "optimizer.weight_decay": 0.1,
            "quantization.training": "fp64",
        }
        | changes
    )


def finished(wanted: Experiment, resume: str | None = None) -> Run:
    run = launch(wanted, baseline=None, **({"resume": resume} if resume else {}))
    run.result(timeout=120)
    return run


@lru_cache
def by_hand(name: str, steps: int = STEPS) -> Loop:
    return loop(getattr(own_tasks, name), experiment(name, **{"training.steps": steps}))


def saved(run: Run) -> dict[str, torch.Tensor]:
    """Weights and buffers of the last checkpoint, of all stages."""
    folder = run.directory.checkpoint(STEPS)
    return {name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()}


def as_reals(tensor: torch.Tensor) -> torch.Tensor:
    """As checkpoints hold complex numbers of float64."""
    return torch.view_as_real(tensor) if tensor.dtype == torch.complex128 else tensor


def assert_as_by_hand(run: Run, hand: Loop, buffers: bool = True) -> None:
    data = run.data()
    assert data.loss == pytest.approx(hand.loss[-len(data.loss) :], abs=EXACT)
    assert data.grad_norm == pytest.approx(hand.norm[-len(data.loss) :], abs=EXACT)
    state = saved(run)
    expected = hand.model.state_dict() if buffers else dict(hand.model.named_parameters())
    assert state.keys() >= expected.keys()
    for name, value in expected.items():
        value = as_reals(value.detach())
        assert state[name].dtype == value.dtype, name
        assert (state[name] - value).abs().max() <= EXACT, name
    if buffers:
        assert data.evaluations[-1][2]["loss"] == pytest.approx(hand.held_out, abs=EXACT)


PIPE = {"pp": 2, "microbatches": 2}
FOLDED = {"pp": 2, "microbatches": 2, "stages_per_rank": 2, "schedule": "zbv"}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"dp_replicate": 2},
    {"dp_shard": 2, "zero_stage": 1},
    {"dp_shard": 2, "zero_stage": 2},
    {"dp_shard": 2, "dp_replicate": 2, "zero_stage": 1},
    PIPE,
    {**PIPE, "dp_shard": 2, "zero_stage": 2},
    FOLDED,
]
NAMED = {"ids": lambda value: str(value).replace("'", "")}

# -- complex numbers (issue 11, A2 and B13) ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, **NAMED)
def test_complex_weights_and_buffers_keep_their_imaginary_part(layout: dict[str, Any]) -> None:
    assert_as_by_hand(finished(experiment("complex_weights", layout)), by_hand("complex_weights"))


@pytest.mark.parametrize("training", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layout": {"dp_replicate": 2}},
        {"layout": {"dp_shard": 2, "zero_stage": 1}},
        {"optimizer.name": "sgd", "layout": PIPE},
    ],
    **NAMED,
)
def test_so_they_do_as_trained(changes: dict[str, Any], training: str) -> None:
    run = finished(experiment("complex_weights", **changes, **{"quantization.training": training}))
    hand = loop(own_tasks.complex_weights, experiment("complex_weights", **changes))
    assert run.data().loss == pytest.approx(hand.loss, abs=1e-5 if training == "fp32" else 0.03)
    weight = saved(run)["blocks.block_1.weight"]
    assert weight.dtype == torch.complex64
    expected = hand.model.state_dict()["blocks.block_1.weight"]
    if training == "fp32":
        assert (weight - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "update",
    [
        {"gradients.update.method": "local_sgd", "gradients.update.every": 1, "optimizer.name": "sgd"},
        {"gradients.update.method": "parameter_server", "gradients.update.staleness": 0, "gradients.update.backup": 0},
        {"gradients.update.method": "delayed", "gradients.update.delay": 0},
        {"gradients.update.method": "gossip", "gradients.update.graph": "complete", "optimizer.name": "sgd"},
    ],
    ids=lambda update: str(update["gradients.update.method"]),
)
def test_so_they_do_where_ranks_combine_weights_or_gradients_by_themselves(update: dict[str, Any]) -> None:
    """In these settings each rule is synchronous training."""
    changes = {**update, "layout": {"dp_replicate": 2}, "training.gradient_norm": False}
    run = finished(experiment("complex_weights", **changes))
    hand = loop(own_tasks.complex_weights, experiment("complex_weights", **changes))
    state = saved(run)
    for name, value in hand.model.state_dict().items():
        assert (state[name] - as_reals(value)).abs().max() <= EXACT, name


@pytest.mark.parametrize(
    "update",
    [{"method": "hogwild"}, {"method": "gossip"}, {"method": "diloco"}, {"method": "parameter_server"}],
    **NAMED,
)
def test_every_rule_trains_imaginary_parts(update: dict[str, Any]) -> None:
    run = finished(experiment("complex_weights", {"dp_replicate": 2}, **{"gradients.update": update}))
    name = "blocks.block_1.weight"
    with torch.no_grad():
        from labkit.workloads.seed import seeded

        with seeded(SEED):
            begin = own_tasks.complex_weights()["model"].state_dict()[name]
    moved = torch.view_as_complex(saved(run)[name]) - begin
    assert (moved.imag != 0).all()
    assert moved.abs().max() < 1, "it trains and does not run away"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization.training": "pure_bf16"}, "complex numbers, which torch does not have in bfloat16"),
        ({"layout": {"dp_shard": 2, "zero_stage": 3}}, "ZeRO 3"),
        (
            {"layout": {"dp_replicate": 2}, "gradients.compression.method": "topk"},
            "layer.weight is complex, and topk compresses real gradients only",
        ),
        (
            {"optimizer.state_bits": 8, "quantization.training": "fp32"},
            "layer.weight is complex, and 8-bit moments",
        ),
        ({"quantization.training": "int8"}, "layer.weight is complex, and low-precision layers are real"),
        (
            {"sparsity.method": "static", "sparsity.target": 0.5, "sparsity.kernel": "dense"},
            "layer.weight is complex, and sparsity chooses among real weights only",
        ),
    ],
    **NAMED,
)
def test_what_knows_real_numbers_only_says_so_in_one_sentence(changes: dict[str, Any], words: str) -> None:
    run = launch(experiment("complex_layer", **changes), baseline=None)
    assert run.wait(60).state == "failed"
    assert run.cause is not None
    assert run.cause["kind"] == "task", run.cause
    assert words in run.cause["message"], run.cause["message"]
    assert not len(run.data().loss)


# -- parameters that nothing uses (A5) and their checkpoints (A12) ----------------------------------------------------

UNUSED: list[dict[str, Any]] = [
    {},
    {"dp_shard": 2, "zero_stage": 1},
    {"dp_shard": 2, "zero_stage": 2},
    {"dp_shard": 3, "zero_stage": 1},
    {"dp_shard": 2, "dp_replicate": 2, "zero_stage": 2},
    {"dp_shard": 2, "zero_stage": 3},
]


@pytest.mark.parametrize("layout", UNUSED, **NAMED)
@pytest.mark.parametrize("name", ["branch", "branch_by_batch"])
def test_what_no_rank_uses_in_an_update_stays_as_it_is(name: str, layout: dict[str, Any]) -> None:
    if name == "branch_by_batch" and layout.get("zero_stage") == 3:
        pytest.skip("ranks that take other branches cannot gather together")
    assert_as_by_hand(finished(experiment(name, layout)), by_hand(name))


RULES: list[dict[str, Any]] = [{"method": "delayed", "delay": 0}, {"method": "parameter_server", "staleness": 0}]
"""Synchronous training by rules that send gradients themselves."""


@pytest.mark.parametrize("rule", RULES, **NAMED)
@pytest.mark.parametrize("name", ["branch", "branch_by_batch", "never_used"])
def test_so_it_does_under_rules_that_send_gradients_themselves(name: str, rule: dict[str, Any]) -> None:
    run = finished(experiment(name, {"dp_replicate": 2}, **{"gradients.update": rule}))
    hand = by_hand(name)
    assert run.data().loss == pytest.approx(hand.loss, abs=EXACT)
    state = saved(run)
    for weight, value in hand.model.named_parameters():
        assert (state[weight] - value.detach()).abs().max() <= EXACT, weight


@pytest.mark.parametrize("method", registry("gradients.compression").names())
@pytest.mark.parametrize("name", ["branch", "never_used"])
def test_compressors_train_what_is_used_late_or_never(name: str, method: str) -> None:
    """1-bit Adam freezes Adam's denominators after its warm-up, when the branch and what is unused have none."""
    start = {"warmup_steps": 1} if method in ("onebit_adam", "topk") else {}
    run = finished(experiment(name, {"dp_replicate": 2}, **{"gradients.compression": {"method": method, **start}}))
    losses = run.data().loss
    assert np.isfinite(losses).all()
    assert losses.max() < 3 * losses[0]
    with seeded(SEED):
        untrained = getattr(own_tasks, name)()["model"].state_dict()
    trained = saved(run)
    for weight, value in untrained.items():
        moved = float((trained[weight] - value).abs().max())
        assert moved == 0 if "never" in weight or "spare" in weight else np.isfinite(moved), weight


@pytest.mark.parametrize("layout", [PIPE, {**PIPE, "dp_shard": 2, "zero_stage": 1}, FOLDED], **NAMED)
def test_so_it_does_in_a_pipeline(layout: dict[str, Any]) -> None:
    assert_as_by_hand(finished(experiment("never_used", layout)), by_hand("never_used"))


@pytest.mark.parametrize("before", [{}, {"dp_shard": 2, "zero_stage": 1}, {"dp_shard": 2, "zero_stage": 3}, PIPE])
def test_a_run_with_parameters_that_never_had_a_gradient_goes_on_in_any_layout(before: dict[str, Any]) -> None:
    half = experiment("never_used", before, **{"training.steps": STEPS // 2, "training.checkpoint_every": STEPS // 2})
    first = finished(half)
    for after in ({}, {"dp_shard": 2, "zero_stage": 2}, PIPE):
        assert_as_by_hand(finished(experiment("never_used", after), resume=first.id), by_hand("never_used"))


# -- losses that are means over something other than samples (A6, B04, B22) -------------------------------------------

WEIGHED: list[dict[str, Any]] = [
    {},
    {"layout": {"dp_replicate": 2}},
    {"layout": {"dp_replicate": 3}, "gradients.accumulation": 2},
    {"gradients.accumulation": 4},
    {"gradients.accumulation": 12},
    {"layout": {"dp_shard": 2, "zero_stage": 1}, "gradients.accumulation": 2},
    {"layout": {"dp_shard": 2, "zero_stage": 3}},
    {"layout": PIPE},
    {"layout": {"pp": 2, "microbatches": 6, "dp_shard": 2, "zero_stage": 2}},
    {"layout": {"dp_replicate": 2}, "gradients.update.method": "delayed", "gradients.update.delay": 0},
]


@lru_cache
def by_hand_masked() -> Loop:
    """A mean over what the mask leaves."""
    mask = own_tasks.Masked().train.tensors["mask"].double()

    def mean(output: torch.Tensor, y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        each = torch.nn.functional.cross_entropy(output, y, reduction="none")
        return (each * mask[indices]).sum() / mask[indices].sum()

    def make() -> Any:
        task, (x, y) = own_tasks.Masked(), own_tasks.data()
        return {"model": task.model, "train": (x, y), "test": (x, y), "loss_fn": torch.nn.CrossEntropyLoss()}

    return loop(make, experiment("masked"), mean)


@pytest.mark.parametrize("changes", WEIGHED, **NAMED)
def test_a_mean_over_something_else_is_that_of_the_whole_batch(changes: dict[str, Any]) -> None:
    """With twelve passes some have nothing to take a mean over: they count for nothing."""
    run = finished(experiment("masked", **changes))
    assert_as_by_hand(run, by_hand_masked(), buffers=False)


@pytest.mark.parametrize("changes", WEIGHED, **NAMED)
@pytest.mark.parametrize("name", ["class_weights", "ignored_targets"])
def test_so_is_that_of_torchs_own_losses(name: str, changes: dict[str, Any]) -> None:
    assert_as_by_hand(finished(experiment(name, **changes)), by_hand(name))


def test_a_rank_without_any_valid_target_counts_for_nothing() -> None:
    """issue 11, B22: every third sample is ignored, one sample a share."""
    whole, parts = ({"training.global_batch": 3, "layout": {"dp_replicate": ranks}} for ranks in (1, 3))
    hand = loop(own_tasks.ignored_targets, experiment("ignored_targets", **whole))
    for changes in (whole, parts, {**whole, "gradients.accumulation": 3}):
        assert_as_by_hand(finished(experiment("ignored_targets", **changes)), hand)


# -- buffers (A7, B08) ------------------------------------------------------------------------------------------------


def judged_again(name: str, run: Run) -> float:
    """The held-out loss of the checkpoint, computed by hand."""
    made = getattr(own_tasks, name)()
    model = made["model"].double()
    model.load_state_dict(saved(run))
    x, y = made["test"]
    with torch.no_grad():
        return float(made["loss_fn"](model.eval()(x.double()), y))


@pytest.mark.parametrize(
    "layout",
    [{}, {"dp_replicate": 2}, {"dp_replicate": 3}, {"dp_shard": 2, "zero_stage": 1}, {"dp_shard": 2}, PIPE],
    **NAMED,
)
@pytest.mark.parametrize("name", ["running_mean", "running_mean_anew"])
def test_a_running_mean_is_that_of_the_whole_batch(name: str, layout: dict[str, Any]) -> None:
    one_pass = {**layout, "microbatches": 1, "schedule": "naive"} if layout.get("pp") else layout
    assert_as_by_hand(finished(experiment(name, one_pass)), by_hand(name))


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": {"dp_replicate": 2}},
        {"layout": {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 2}},
        {"layout": {"dp_shard": 2}},
        {"layout": {**PIPE, "dp_replicate": 2}},
        {"layout": {"dp_replicate": 2}, "gradients.update.method": "local_sgd", "gradients.update.every": 4},
        {"layout": {"dp_replicate": 2}, "gradients.update.method": "delayed"},
        {"layout": {"dp_replicate": 2}, "gradients.update.method": "gossip", "gradients.update.graph": "complete"},
    ],
    **NAMED,
)
@pytest.mark.parametrize("name", ["batch_norm", "running_mean", "running_mean_anew"])
def test_a_reported_metric_is_that_of_the_saved_model(name: str, changes: dict[str, Any]) -> None:
    run = finished(experiment(name, **changes, **{"training.evaluate_every": 2}))
    assert run.data().evaluations[-1][2]["loss"] == pytest.approx(judged_again(name, run), abs=EXACT)


@pytest.mark.parametrize("layout", [{**PIPE, "microbatches": 1, "schedule": "naive"}, {"pp": 2, "balance": "cost"}])
def test_finding_out_shapes_and_costs_leaves_no_trace_in_statistics(layout: dict[str, Any]) -> None:
    layout = {"microbatches": 1, "schedule": "naive", **layout}
    assert_as_by_hand(finished(experiment("batch_norm", layout)), by_hand("batch_norm"))


# -- targets and losses in narrow formats (B15, B23) ------------------------------------------------------------------


@pytest.mark.parametrize("training", ["fp32", "bf16", "pure_bf16"])
@pytest.mark.parametrize("layout", [{}, {"dp_shard": 2, "zero_stage": 1}, PIPE], **NAMED)
def test_losses_of_probabilities_are_computed_in_float32(training: str, layout: dict[str, Any]) -> None:
    run = finished(experiment("probabilities", layout, **{"quantization.training": training}))
    data = run.data()
    assert data.loss == pytest.approx(by_hand("probabilities").loss, abs=0.02)
    assert data.evaluations[-1][2]["loss"] == pytest.approx(by_hand("probabilities").held_out, abs=0.02)


@pytest.mark.parametrize("training", ["fp32", "bf16", "pure_bf16"])
def test_targets_are_not_rounded_with_the_inputs(training: str) -> None:
    run = finished(experiment("years", **{"quantization.training": training}))
    assert run.data().evaluations[-1][2]["loss"] == pytest.approx(by_hand("years").held_out, abs=0.01)


# -- hooks on parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, *LAYOUTS[1:3], PIPE, FOLDED], **NAMED)
@pytest.mark.parametrize("name", ["hooked", "hooked_afterwards"])
def test_hooks_on_parameters_are_kept_or_refused(name: str, layout: dict[str, Any]) -> None:
    if name == "hooked_afterwards" and layout.get("schedule") == "zbv":
        run = launch(experiment(name, layout), baseline=None)
        assert run.wait(60).state == "failed"
        assert run.cause is not None
        assert "which the schedule zbv never calls: use register_hook" in run.cause["message"]
        return
    assert_as_by_hand(finished(experiment(name, layout)), by_hand(name))


@pytest.mark.parametrize("name", ["hooked", "hooked_afterwards"])
def test_a_copy_of_the_model_has_the_hooks_too(name: str) -> None:
    """Rank 0 of a parameter server computes with a copy; half of the rows must not move."""
    update = {"gradients.update.method": "parameter_server", "training.gradient_norm": False}
    served = experiment(name, {"dp_replicate": 2}, **update, **{"optimizer.weight_decay": 0.0})
    weight = saved(finished(served))["blocks.block_1.weight"]
    from labkit.workloads.seed import seeded

    with seeded(SEED):
        before = getattr(own_tasks, name)()["model"].blocks["block_1"].weight.detach()
    assert torch.equal(weight[4:], before[4:].double())
    assert not torch.equal(weight[:4], before[:4].double())


def test_a_hook_that_is_not_linear_is_noted() -> None:
    (note,) = [
        note for note in finished(experiment("clipping_hook", {"dp_replicate": 2})).summary()["notes"] if "hook" in note
    ]
    assert note == (
        "blocks.block_1.weight: its hook sees only the gradient of one rank's samples, so ranks differ from one process"
    )
    for name in ("hooked", "hooked_afterwards"):
        notes = finished(experiment(name, {"dp_replicate": 2})).summary()["notes"]
        assert not [note for note in notes if "hook" in note]
