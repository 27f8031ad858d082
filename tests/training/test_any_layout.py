"""Any layout at all either trains, or is refused with a sentence; in bounded time, whatever was asked for."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit.experiment import Experiment, ExperimentError, Layout
from labkit.experiment.layout import AXES
from labkit.experiment.registry import registry
from labkit.launch import launch, warm
from labkit.proofs.cases import FAMILIES, VALUES
from labkit.runs.run import Run

MOST_RANKS, BOUND_S = 8, 90.0
ROUNDS = 8
"""How often the nearest legal value is taken; each removes a problem, and may show another one."""

axis = st.sampled_from([1, 1, 1, 1, 2, 2, 3, 4])
layouts = st.fixed_dictionaries(
    dict.fromkeys(AXES, axis)
    | {
        "sequence_parallel": st.booleans(),
        "zero_stage": st.sampled_from([1, 2, 3]),
        "schedule": st.sampled_from(registry("layout.schedule").names()),
        "microbatches": st.integers(1, 9),
        "stages_per_rank": st.integers(1, 3),
        "balance": st.sampled_from(["blocks", "parameters", "cost"]),
        "weight_stashing": st.booleans(),
        "weight_prediction": st.sampled_from([0.0, 2.0]),
        "stage_blocks": st.none() | st.lists(st.integers(1, 4), min_size=2, max_size=4),
        "activation_checkpointing": st.sampled_from(["none", "selective", "full"]),
        "cpu_offload": st.booleans(),
    }
)
options = st.fixed_dictionaries(
    {name: st.sampled_from(values) for name, values in VALUES.items() if not name.startswith("layout.")}
    | {
        "training.global_batch": st.integers(1, 40),
        "quantization.training": st.sampled_from(registry("quantization.training").names()),
        "optimizer.beta1": st.sampled_from([0.0, 0.9]),
    }
)


@st.composite
def experiments(draw: st.DrawFn) -> Experiment:
    family = FAMILIES[draw(st.sampled_from(list(FAMILIES)))]
    workload = family.workload | {name: draw(st.sampled_from(values)) for name, values in family.options.items()}
    layout = draw(layouts)
    for name in AXES:  # the machine is small: later axes give way
        if Layout(**{other: layout[other] for other in AXES}).world_size > MOST_RANKS:
            layout[name] = 1
    return Experiment().set(
        {
            "workload": workload,
            "layout": layout,
            "training.steps": 1,
            "training.checkpoint_every": 0,
            "training.gradient_norm": True,
            "launch.device": "cpu",
            "launch.max_duration_s": 60,
            "launch.timeout_s": 30,
            "launch.grace_s": 1,
        }
        | draw(options)
    )


def nearest(experiment: Experiment) -> Experiment:
    """With the nearest legal value of the first problem that has one."""
    for problem in experiment.problems():
        if problem.nearest is not None:
            return experiment.replace(f"{problem.field}={problem.nearest}")
    return experiment


def outcome(experiment: Experiment) -> str:
    """`refused` or `ran`; AssertionError with the experiment for anything else."""
    problems = experiment.problems()
    for problem in problems:
        assert problem.field
        assert len(problem.reason.split()) > 3, "a sentence"
    if problems:
        with pytest.raises(ExperimentError):
            launch(experiment, baseline=None)
        return "refused"
    assert_it_ran(launch(experiment, baseline=None), experiment)
    return "ran"


def assert_it_ran(run: Run, experiment: Experiment) -> None:
    begun = time.monotonic()
    try:
        run.wait(BOUND_S)
    except TimeoutError:
        run.stop(0)
        raise AssertionError(f"no end after {time.monotonic() - begun:.0f} s: {experiment.to_json(None)}") from None
    assert run.state == "finished", f"{run.cause}: {experiment.to_json(None)}"
    data = run.data()
    assert data.steps == 1
    assert data.loss[0] > 0
    assert len(data.evaluations) == 1


def check(experiment: Experiment) -> list[str]:
    """The experiment as it is, and if it is refused, what its nearest values lead to."""
    found = [outcome(experiment)]
    for _ in range(ROUNDS):
        if found[-1] == "ran":
            break
        changed = nearest(experiment)
        if changed == experiment:
            break
        experiment = changed
        if not experiment.problems():
            found.append(outcome(experiment))
    return found


met: list[str] = []


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@settings(max_examples=16, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(experiments())
def test_it_trains_or_is_refused_with_a_sentence(experiment: Experiment) -> None:
    warm(60)
    met.extend(check(experiment))


@pytest.mark.exhaustive
def test_both_have_happened() -> None:
    assert met.count("ran") >= 10, met
    assert met.count("refused") >= 5, met


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Layout.model_fields)), st.integers(-3, 9) | st.booleans() | st.text()))
def test_any_values_at_all_are_read_or_refused_in_words(fields: dict[str, Any]) -> None:
    try:
        problems = Experiment().set({"layout": fields}).problems()
    except ExperimentError as error:
        problems = error.problems
    assert all(problem.reason.strip() for problem in problems)
