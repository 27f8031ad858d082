"""The asynchronous pipeline against a simulation of it in one process, and what it keeps, refuses and learns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call

from labkit.experiment import Experiment, ExperimentError, Layout
from labkit.experiment.recipes import recipe
from labkit.experiment.registry import registry
from labkit.launch import launch
from labkit.parallel.asynchronous import LookaheadBatches
from labkit.parallel.decay import with_decay_flags
from labkit.parallel.stages import minimal_maximum, split_into_stages
from labkit.plots.memory import memory
from labkit.plots.timeline import timeline
from labkit.proofs.parity import parity_not_applicable
from labkit.runs import Run
from labkit.training.optimizers import learning_rate, make_optimizer, set_learning_rate
from labkit.training.sampling import BatchOrder
from tests.launch.helpers import events, start, steps_written, wait_until

pytestmark = pytest.mark.timeout(900)  # whole recipes are trained

CHAIN = Path(__file__).parents[1] / "training" / "chain_task.py"
STEPS, BATCH, WITHIN = 12, 8, 1e-9


def chain(stages: int, stash: bool = True, predict: float = 0.0, **changes: Any) -> Experiment:
    """PipeDream over a short chain, in double precision; `changes` with `__` for the dot."""
    fields = {
        "workload": {"name": "custom", "path": f"{CHAIN}:make"},
        "layout": {
            "pp": stages,
            "schedule": "pipedream",
            "weight_stashing": stash,
            "weight_prediction": predict,
        },
        "optimizer.lr": 0.05,
        "optimizer.schedule": "constant",
        "training.steps": STEPS,
        "training.global_batch": BATCH,
        "training.evaluate_every": 0,
        "training.checkpoint_every": 0,
        "quantization.training": "fp64",
        "launch.device": "cpu",
        "launch.max_duration_s": 120,
    }
    return Experiment().set(fields | {name.replace("__", "."): value for name, value in changes.items()})


def finished(experiment: Experiment, **options: Any) -> Run:
    run = launch(experiment, baseline=None, **options)
    run.result(timeout=120)
    return run


def staleness(run: Run, rank: int) -> list[int]:
    """That of every update of the rank, in order."""
    return [one for event in events(run, rank) if event["event"] == "steps" for one in event["staleness"]]


def age(update: int, stage: int, stages: int, empty: tuple[int, ...]) -> int:
    """How stale the gradient of a stage should be, if the pipeline was empty after so many updates."""
    return min(update - max(one for one in empty if one <= update), stages - 1 - stage)


def simulated(experiment: Experiment, empty: tuple[int, ...] = (0,)) -> list[float]:
    """Losses of PipeDream in one process: each stage's weights are taken from so many updates ago."""
    settings, stages, steps = experiment.optimizer, experiment.layout.pp, experiment.training.steps or 0
    stash, predict = experiment.layout.weight_stashing, experiment.layout.weight_prediction
    workload = registry("workload")[experiment.workload.name].load()
    task = workload.build(workload.Options(**experiment.workload.options), experiment.training.seed)
    model = task.model.double()
    names = list(model.blocks)
    lengths = experiment.layout.stage_blocks or minimal_maximum([1.0] * len(names), stages)
    stage_of = {name: stage for stage, group in enumerate(split_into_stages(names, lengths)) for name in group}
    optimizer = make_optimizer(settings, with_decay_flags(model.parameters()))
    order = BatchOrder(len(task.train), experiment.training.global_batch, experiment.training.seed)
    losses, versions = [], []
    for update in range(steps):
        versions.append({name: one.detach().clone() for name, one in model.named_parameters()})
        weights = {}
        for name in versions[update]:
            stale = age(update, stage_of[name.split(".")[1]], stages, empty)
            weight = versions[update - stale][name].clone()
            if predict and stash and update - stale not in empty:
                weight += predict * stale * (weight - versions[update - stale - 1][name])
            weights[name] = weight.requires_grad_()
        batch = {
            name: x.double() if x.is_floating_point() else x
            for name, x in task.train.__getitems__(order.update(update).tolist()).items()
        }
        loss = task.loss(functional_call(model, weights, (batch["x"],)), batch)
        if not stash:  # the backward pass finds the newest weights
            for name, weight in weights.items():
                weight.data.copy_(versions[update][name])
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for stage in range(stages) if settings.clip_norm else ():
            own = [one for name, one in model.named_parameters() if stage_of[name.split(".")[1]] == stage]
            torch.nn.utils.clip_grad_norm_(own, settings.clip_norm / stages**0.5)
        set_learning_rate(optimizer, learning_rate(settings, update, steps))
        optimizer.step()
        losses.append(loss.item())
    return losses


def apart(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stash", "predict"), [(True, 0.0), (False, 0.0), (True, 2.0)])
@pytest.mark.parametrize("stages", [2, 3])
def test_it_computes_what_the_paper_says(stages: int, stash: bool, predict: float) -> None:
    experiment = chain(stages, stash, predict)
    run = finished(experiment)
    assert apart(run.data().loss, simulated(experiment)) <= WITHIN
    for rank in range(stages):
        assert staleness(run, rank) == [age(update, rank, stages, (0,)) for update in range(STEPS)]
    found = run.summary()["staleness"]
    assert found["max"] == stages - 1
    assert sum(found["histogram"]) == stages * STEPS


def test_without_stashing_nothing_is_predicted() -> None:
    assert simulated(chain(2, False, 2.0)) == simulated(chain(2, False, 0.0))
    assert apart(finished(chain(2, False, 2.0)).data().loss, simulated(chain(2, False))) <= WITHIN


def test_without_stashing_it_computes_something_else() -> None:
    synchronous = chain(3, layout__schedule="1f1b", layout__microbatches=4)
    losses = [finished(one).data().loss for one in (chain(3, stash=True), chain(3, stash=False), synchronous)]
    assert all(apart(one[:1], other[:1]) <= WITHIN for one, other in pairwise(losses)), (
        "all begin with one set of weights"
    )
    assert all(apart(one, other) > 1e-4 for one, other in pairwise(losses))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__name": "sgd", "optimizer__momentum": 0.9},
        {"layout__stage_blocks": (1, 4, 1)},
        {"optimizer__clip_norm": 0.2},
        {"layout__activation_checkpointing": "full"},
        {"workload": {"name": "custom", "path": f"{CHAIN}:lower_frozen"}, "layout__stage_blocks": (3, 1, 2)},
        {"training__loader_workers": 1},
    ],
    ids=str,
)
def test_options_keep_what_it_computes(changes: dict[str, Any]) -> None:
    plain = {key: value for key, value in changes.items() if not key.endswith(("checkpointing", "workers"))}
    for predict in (0.0, 2.0):
        run = finished(chain(3, predict=predict, **changes))
        assert apart(run.data().loss, simulated(chain(3, predict=predict, **plain))) <= WITHIN


def test_evaluations_find_the_pipeline_empty() -> None:
    every, empty = 5, (0, 5, 10)
    experiment = chain(3, predict=2.0, training__evaluate_every=every)
    run = finished(experiment)
    assert apart(run.data().loss, simulated(experiment, empty)) <= WITHIN
    assert [step for step, _, _ in run.data().evaluations] == [5, 10, STEPS]
    for rank in range(3):
        assert staleness(run, rank) == [age(update, rank, 3, empty) for update in range(STEPS)]


# -- stop and resume --------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_exactly() -> None:
    whole = finished(chain(3, predict=2.0, training__checkpoint_every=7)).data()
    first = finished(chain(3, predict=2.0, training__steps=7, training__checkpoint_every=7))
    rest = finished(chain(3, predict=2.0), resume=first.id).data()
    assert [*first.data().loss, *rest.loss] == whole.loss.tolist()
    assert apart(whole.loss, simulated(chain(3, predict=2.0), empty=(0, 7))) <= WITHIN


def test_a_stop_leaves_nothing_under_way() -> None:
    run = start(chain(3, training__steps=1_000_000, training__checkpoint_every=1_000_000))
    wait_until(lambda: steps_written(run, 0) > 3, 60, "the first steps")
    assert run.stop().state == "stopped", run.cause
    done = run.data().steps
    assert {steps_written(run, rank) for rank in range(3)} == {done}, "all stages have made the same updates"
    assert run.checkpoints() == [done]
    rest = finished(chain(3, training__steps=done + 4), resume=run.id)
    assert staleness(rest, 0) == [0, 1, 2, 2]
    losses = [*run.data().loss, *rest.data().loss]
    assert apart(losses, simulated(chain(3, training__steps=done + 4), empty=(0, done))) <= 1e-6


def test_any_other_layout_goes_on_from_it() -> None:
    first = finished(chain(2, training__checkpoint_every=STEPS))
    alone = chain(1, layout__schedule="1f1b", training__steps=STEPS + 2)
    rest = finished(alone, resume=first.id)
    assert len(rest.data().loss) == 2


# -- what is seen of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stash", "predict", "versions"), [(True, 0.0, (2, 1, 0)), (True, 2.0, (3, 2, 0)), (False, 0.0, (0, 0, 0))]
)
def test_the_stash_is_measured(stash: bool, predict: float, versions: tuple[int, ...]) -> None:
    run = finished(chain(3, stash, predict))
    found = run.summary()["memory"]
    for count, measured, formula in zip(versions, found["measured"], found["formula"], strict=True):
        assert measured["stash"] == formula["stash"] == count * formula["parameters"]
        for kind in ("parameters", "gradients"):
            assert measured[kind] == formula[kind]
    assert "Stashed weights (peak)" in memory(run).rows[0]
    under_way = [measured["activations"] for measured in found["measured"]]
    assert under_way[0] == 3 / 2 * under_way[1], "three minibatches are under way on the first stage, two on the second"


def test_its_timeline_is_drawn() -> None:
    run = finished(chain(2, training__trace_step=7))
    rows = run.data().timeline
    order = {rank: [f"{action.kind}{action.microbatch}" for action in row] for rank, row in rows.items()}
    assert order == {0: ["F5", "B4", "F6", "B5", "F7", "B6"], 1: ["F4", "B4", "F5", "B5", "F6", "B6"]}
    for row in rows.values():
        assert all(one.end <= other.begin for one, other in pairwise(row))
    bubble = run.summary()["bubble"]
    assert bubble["textbook"] is None
    assert bubble["own"] < 0.5
    assert timeline(run).summary.startswith("pipedream: ranks were idle")
    sent = run.data().traffic
    assert {sent[rank]["pp"]["bytes"] for rank in (0, 1)} == {BATCH * 8 * 8}, "one activation, one gradient of it"


def test_batches_are_handed_out_in_order_whoever_looks_ahead() -> None:
    supply = LookaheadBatches(iter([{"x": torch.tensor(number)} for number in range(5)]))
    assert [int(next(supply)["x"]), int(supply.peek(2)["x"]), int(supply.peek(0)["x"])] == [0, 3, 1]
    assert [int(batch["x"]) for batch in supply] == [1, 2, 3, 4]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layout__pp": 1}, "layout.schedule"),
        ({"layout__dp_replicate": 2}, "layout.schedule"),
        ({"layout__tp": 2}, "layout.schedule"),
        ({"layout__stages_per_rank": 2}, "layout.stages_per_rank"),
        ({"gradients__accumulation": 2}, "gradients.accumulation"),
        ({"gradients__compression": {"method": "fp16"}}, "gradients.compression.method"),
        ({"launch__isolated": True}, "launch.isolated"),
        ({"gradients__update": {"method": "diloco"}}, "gradients.update.method"),
        ({"sparsity": {"method": "rigl", "target": 0.5}}, "sparsity.method"),
        ({"optimizer__state_bits": 8, "quantization__training": "fp32"}, "optimizer.state_bits"),
        ({"training__gradient_norm": True}, "training.gradient_norm"),
        ({"workload": {"name": "language", "tied": True}}, "workload.tied"),
    ],
    ids=str,
)
def test_it_is_refused(changes: dict[str, Any], field: str) -> None:
    assert chain(2).problems() == []
    assert field in [problem.field for problem in chain(2, **changes).problems()]


def test_tied_weights_that_no_rule_knows_are_said_by_the_ranks() -> None:
    run = launch(chain(2, workload={"name": "custom", "path": f"{CHAIN}:shared_module"}), baseline=None)
    run.wait(60)
    assert run.state == "failed"
    assert "an asynchronous pipeline has no tied weights" in str(run.cause)


def test_what_has_no_or_another_effect_is_said() -> None:
    said = {warning.field for warning in chain(2, layout__microbatches=3, optimizer__clip_norm=1.0).warnings()}
    assert {"layout.microbatches", "optimizer.clip_norm"} <= said
    assert chain(2, layout__microbatches=3, training__global_batch=7).problems() == []
    said = {warning.field for warning in chain(2, stash=False, layout__schedule="1f1b").warnings()}
    assert {"layout.weight_stashing", "layout.weight_prediction"} <= said


def test_another_update_rule_is_refused_in_one_sentence() -> None:
    [problem] = chain(2, gradients__update={"method": "diloco"}).problems()
    assert problem.nearest == "synchronous"


def test_it_claims_no_parity() -> None:
    problem = parity_not_applicable(chain(2))
    assert problem is not None
    assert (problem.field, problem.nearest) == ("layout.schedule", "1f1b")


# -- its old name -----------------------------------------------------------------------------------------------------

OLD = {"method": "pipedream", "stash": False, "predict": 1.0}


@pytest.mark.parametrize(
    "read",
    [
        lambda: Experiment.from_dict({"layout": {"pp": 2, "schedule": "gpipe"}, "gradients": {"update": OLD}}),
        lambda: Experiment.from_dict({"layout": "pp2", "gradients": {"update": OLD}}),
        lambda: Experiment(layout=Layout(pp=2), gradients={"update": OLD}),  # type: ignore[arg-type]
        lambda: Experiment().set({"layout": "pp2", "gradients.update": OLD}),
        lambda: Experiment().replace(
            "gradients.update.method=pipedream",
            "gradients.update.stash=false",
            "gradients.update.predict=1",
            "layout=pp2",
        ),
        lambda: Experiment().set(
            {"layout.pp": 2, "layout.schedule": "pipedream", "gradients.update": {"stash": False, "predict": 1.0}}
        ),
    ],
)
def test_it_was_an_update_rule(read: Callable[[], Experiment]) -> None:
    with pytest.warns(FutureWarning, match=r"set layout\.schedule=pipedream"):
        experiment = read()
    layout = {"pp": 2, "schedule": "pipedream", "weight_stashing": False, "weight_prediction": 1.0}
    assert experiment == Experiment().set({"layout": layout})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Experiment.from_json(experiment.to_json()) == experiment


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"layout": "nonsense"}, "layout"),
        ({"layout": [1]}, "layout"),
        ({"layout": {"pp": 2}, "gradients": {"update": OLD | {"stash": "perhaps"}}}, "layout.weight_stashing"),
        ({"layout": {"pp": 2}, "gradients": {"update": OLD | {"every": 3}}}, "gradients.update.every"),
    ],
)
@pytest.mark.filterwarnings("ignore:PipeDream is a pipeline schedule:FutureWarning")
def test_what_is_wrong_beside_its_old_name_is_still_refused(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(ExperimentError) as refusal:
        Experiment.from_dict({"gradients": {"update": OLD}} | wrong)
    assert field in [problem.field for problem in refusal.value.problems]


# -- what it learns ---------------------------------------------------------------------------------------------------


def learned(name: str, **changes: Any) -> dict[str, Any]:
    fields = {"layout.dp_replicate": 1, "layout.pp": 2, "launch.device": "cpu", "training.checkpoint_every": 0}
    metrics: dict[str, Any] = finished(recipe(name).set(fields | changes)).summary()["metrics"]
    return metrics


@pytest.mark.exhaustive
def test_it_learns_to_read_digits() -> None:
    assert learned("vision-ddp", **{"layout.schedule": "pipedream"})["accuracy"] >= 0.95


@pytest.mark.exhaustive
def test_it_learns_language_nearly_as_well_as_a_synchronous_pipeline() -> None:
    stale = learned("language-ddp", **{"layout.schedule": "pipedream"})
    synchronous = learned("language-ddp", **{"layout.microbatches": 2})
    assert stale["loss"] <= 1.03 * synchronous["loss"]
