"""Update rules: equal to what is written by hand, to each other in their limits, and to synchronous training there."""

from __future__ import annotations

import shutil
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from labkit.experiment import Experiment
from labkit.launch import launch
from labkit.runs.data import RunData
from tests.gradients import by_hand
from tests.launch.helpers import events, tiny

EXACT = 1e-9
SGD = {"optimizer__name": "sgd", "optimizer__lr": 0.005}


def experiment(ranks: int = 2, steps: int = 9, **changes: Any) -> Experiment:
    fields = {"quantization__training": "fp64", "optimizer__schedule": "constant", "optimizer__lr": 3e-3}
    return tiny(ranks, steps, **fields | changes)


def rule(method: str, **options: Any) -> dict[str, Any]:
    return {"gradients__update": {"method": method, **options}}


def finished(wanted: Experiment, resume: Any = None) -> RunData:
    run = launch(wanted, baseline=None, **({"resume": resume} if resume else {}))
    run.result(timeout=120)
    return run.data()


@lru_cache
def synchronous(ranks: int = 2, sgd: bool = False, steps: int = 9) -> Any:
    return finished(experiment(ranks, steps, **(SGD if sgd else {}))).loss


def difference(one: Any, other: Any) -> float:
    assert len(one) == len(other)
    return float(np.abs(one - other).max())


OUTER = {"outer_lr": 0.7, "outer_momentum": 0.9, "rate_factor": 1.0}
PLAIN = {"average_optimizer": False}
ONE = {"rate_factor": 1.0}
BY_HAND = {
    "local_sgd": ({"every": 4, "rate_factor": 1.0, **PLAIN}, lambda: by_hand.local_sgd(4)),
    "delayed": ({"delay": 2, "predict": 0}, lambda: by_hand.delayed(2)),
    "delayed, ahead": ({"delay": 2}, lambda: by_hand.delayed(2, ahead=2.0)),
    "diloco": ({"every": 3, **OUTER}, lambda: by_hand.diloco(3, 0.7, 0.9)),
    "streaming_diloco": (
        {"every": 3, "fragments": 2, "delay": 1, "alpha": 0.25, "bits": 32, **OUTER},
        lambda: by_hand.streaming(3, 2, 1, 0.25, 0.7, 0.9),
    ),
}


@pytest.mark.parametrize("method", BY_HAND)
@pytest.mark.parametrize("ranks", [2, 3])
def test_it_computes_what_is_written_by_hand(method: str, ranks: int) -> None:
    options, naive = BY_HAND[method]
    wanted = experiment(ranks, **rule(method.split(",")[0], **options))
    assert difference(finished(wanted).loss, by_hand.losses(wanted, naive())) <= EXACT


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("method", "options", "sgd"),
    [
        ("local_sgd", {"every": 1, **PLAIN}, True),
        ("local_sgd", {"every": 1, "average_optimizer": True}, True),
        ("gossip", {"graph": "complete"}, True),
        ("post_local_sgd", {"switch": 1.0}, False),
        ("diloco", {"every": 1, "outer_lr": 1.0, "outer_momentum": 0.0}, True),
        ("delayed", {"delay": 0}, False),
        ("parameter_server", {"staleness": 0}, False),
    ],
)
def test_its_limit_is_synchronous_training(method: str, options: dict[str, Any], sgd: bool, ranks: int) -> None:
    data = finished(experiment(ranks, **(SGD if sgd else {}), **rule(method, **options)))
    assert difference(data.loss, synchronous(ranks, sgd)) <= EXACT


@pytest.mark.parametrize(
    ("method", "options"), [("local_sgd", {"every": 3}), ("delayed", {}), ("diloco", {"every": 3}), ("gossip", {})]
)
def test_away_from_the_limit_it_is_not(method: str, options: dict[str, Any]) -> None:
    """What would make the tests above pass by doing nothing."""
    assert difference(finished(experiment(**SGD, **rule(method, **options))).loss, synchronous(sgd=True)) > 1e-6


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (rule("diloco", every=3, outer_lr=1.0, outer_momentum=0.0), rule("local_sgd", every=3, **PLAIN)),
        (rule("streaming_diloco", every=3, fragments=1, delay=0, alpha=0.0, bits=32), rule("diloco", every=3)),
        (rule("post_local_sgd", switch=0.0, every=3), rule("local_sgd", every=3)),
        (rule("gossip", graph="ring"), rule("gossip", graph="complete")),
    ],
)
def test_one_rule_is_a_special_case_of_the_other(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert difference(finished(experiment(3, **one)).loss, finished(experiment(3, **other)).loss) <= EXACT


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_no_gradient_is_staler_than_the_bound(bound: int) -> None:
    data = finished(experiment(4, 12, **rule("parameter_server", staleness=bound)))
    assert data.staleness.sum() == 4 * 12  # every piece of work was used, and once
    assert len(data.staleness) <= bound + 1


@pytest.mark.parametrize("method", ["parameter_server", "hogwild", "gossip"])
def test_ranks_that_draw_their_work_do_all_of_it_once(method: str) -> None:
    options = {"staleness": -1} if method == "parameter_server" else {}
    data = finished(experiment(3, 8, training__evaluate_every=3, **rule(method, **options)))
    assert sum(data.rank_steps) == 3 * 8
    assert data.steps == 8
    assert data.samples.tolist() == [12] * 8
    assert [step for step, _, _ in data.evaluations] == [3, 6, 8]
    assert data.staleness.sum() == 24
    assert (np.diff(data.elapsed) >= 0).all()
    assert np.isfinite(data.loss).all()


def test_backup_workers_drop_what_comes_late_and_do_it_again() -> None:
    run = launch(experiment(4, 10, **rule("parameter_server", staleness=0, backup=1)), baseline=None)
    run.result(timeout=120)
    data = run.data()
    assert data.staleness.tolist() == [40]
    assert data.samples.tolist() == [12] * 10


RULES: list[tuple[str, dict[str, Any]]] = [
    ("local_sgd", {"every": 2, **PLAIN}),
    ("local_sgd", {"every": 2, "average_optimizer": True}),
    ("post_local_sgd", {"every": 2}),
    ("diloco", {"every": 3}),
    ("diloco", {"every": 3, "bits": 16}),
    ("diloco", {"every": 3, "bits": 8}),
    ("streaming_diloco", {"every": 4, "fragments": 3}),
    ("delayed", {}),
    ("gossip", {"graph": "ring"}),
    ("gossip", {"graph": "complete"}),
    ("gossip", {"graph": "pairs"}),
    ("parameter_server", {}),
]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("method", "options"), RULES)
def test_the_bytes_that_leave_are_those_of_the_formula(method: str, options: dict[str, Any], ranks: int) -> None:
    run = launch(experiment(ranks, training__evaluate_every=4, **rule(method, **options)), baseline=None)
    together = run.result(timeout=120)["communication"]["counted_bytes_of_all_ranks"]
    counted = []
    for rank in range(ranks):
        [told] = [one for one in events(run, rank) if one["event"] == "communication"]
        counted.append(told["counted_bytes_per_step"])
        assert counted[-1] == told["formula_bytes_per_step"] > 0
    assert together == sum(counted)


@pytest.mark.parametrize(("method", "options"), [one for one in RULES if one[0] not in ("parameter_server",)][:9])
def test_a_resumed_run_goes_on_exactly(method: str, options: dict[str, Any]) -> None:
    if options.get("bits", 32) < 16 or method == "streaming_diloco":
        options = options | {"bits": 32}
    saved = {"training__checkpoint_every": 3, "training__keep_checkpoints": 9}
    whole = launch(experiment(2, 8, **saved, **rule(method, **options)), baseline=None)
    whole.result(timeout=120)
    for step in (6, 8):
        shutil.rmtree(whole.directory.checkpoint(step))
    again = finished(whole.experiment, resume=whole)
    assert difference(again.loss, whole.data().loss[3:]) <= EXACT


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({**rule("local_sgd"), "layout__dp_replicate": 1}, "gradients.update.method"),
        ({**rule("diloco"), "layout": {"dp_shard": 2}}, "gradients.update.method"),
        ({**rule("gossip"), "gradients__compression": {"method": "fp16"}}, "gradients.compression.method"),
        ({**rule("hogwild"), "training__loader_workers": 1}, "training.loader_workers"),
        ({**rule("local_sgd"), "launch__isolated": True}, "gradients.update.method"),
        (rule("streaming_diloco", every=2, fragments=3), "gradients.update.fragments"),
        (rule("streaming_diloco", every=4, delay=4), "gradients.update.delay"),
        (rule("parameter_server", staleness=3, backup=1), "gradients.update.backup"),
        (rule("parameter_server", staleness=0, backup=2), "gradients.update.backup"),
        ({**rule("hogwild"), "launch__network": {"rate_mbit": 100}}, "launch.network"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], field: str) -> None:
    assert field in [problem.field for problem in experiment(**changes).problems()]


def test_ranks_that_step_by_themselves_take_larger_steps_with_adamw_only() -> None:
    one = finished(experiment(4, 4, **rule("local_sgd", every=2)))
    other = finished(experiment(4, 4, optimizer__lr=6e-3, **rule("local_sgd", every=2, rate_factor=1.0)))
    assert difference(one.loss, other.loss) <= EXACT
    sgd = [finished(experiment(4, 4, **SGD, **rule("local_sgd", every=2, **more))).loss for more in ({}, ONE)]
    assert difference(*sgd) <= EXACT
