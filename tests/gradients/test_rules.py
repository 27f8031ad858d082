"""What compressed gradients do not go with is refused with a sentence, what has no effect says so."""

from __future__ import annotations

from typing import Any

import pytest

from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.registry import registry
from labkit.proofs.parity import check
from labkit.runs import Run
from tests.launch.helpers import start, tiny

KEYS = [key for key in registry("gradients.compression").names() if key != "none"]
HOSTS = {"launch__network": {"rate_mbit": 1000, "hosts": 2}}


def problems(experiment: Experiment) -> dict[str, str]:
    return {problem.field: problem.reason for problem in experiment.problems()}


def warnings(experiment: Experiment) -> dict[str, str]:
    return {warning.field: warning.reason for warning in experiment.warnings()}


def compressed(key: str = "sign", options: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    return tiny(gradients__compression={"method": key} | (options or {}), **changes)


METHOD = "gradients.compression.method"
REFUSED = {
    "ZeRO 3": ("sign", {"layout": {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 3}}, METHOD, "fully_shard"),
    "shared memory": ("sign", {"launch__transport": "shared_memory"}, "launch.transport", "process group"),
    "low rank of a part": (
        "powersgd",
        {"layout": {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 1}},
        METHOD,
        "needs matrices",
    ),
    "low rank between hosts": ("powersgd", {"gradients__hierarchical": True} | HOSTS, METHOD, "needs matrices"),
    "1-bit Adam between hosts": ("onebit_adam", {"gradients__hierarchical": True} | HOSTS, METHOD, "without their"),
    "1-bit Adam by SGD": ("onebit_adam", {"optimizer__name": "sgd"}, "optimizer.name", "momentum of AdamW"),
    "1-bit Adam in stages": (
        "onebit_adam",
        {"layout": {"dp_replicate": 2, "pp": 2, "microbatches": 2}},
        METHOD,
        "cannot be summed",
    ),
    "another update rule": ("sign", {"gradients__update": {"method": "local_sgd"}}, METHOD, "no gradients"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    key, changes, field, words = REFUSED[case]
    assert words in problems(compressed(key, **changes))[field]


@pytest.mark.parametrize("key", KEYS)
def test_the_nearest_legal_value_is_legal(key: str) -> None:
    layout = {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 3}
    experiment = compressed(key, layout=layout, launch__transport="shared_memory", training__global_batch=16)
    for problem in experiment.problems():
        experiment = experiment.replace(f"{problem.field}={problem.nearest}")
    assert not experiment.problems()


def test_momentum_correction_is_for_sgd_with_momentum() -> None:
    options, field = {"momentum_correction": True}, "gradients.compression.momentum_correction"
    assert "moments of another kind" in problems(compressed("topk", options))[field]
    assert (
        "no momentum here"
        in problems(compressed("topk", options, optimizer__name="sgd", optimizer__momentum=0.0))[field]
    )
    assert not problems(compressed("topk", options, optimizer__name="sgd"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": {"dp_replicate": 1}}, "no two ranks"),
        ({"layout": {"tp": 2}}, "no two ranks"),
        ({"layout": {"dp_shard": 2, "zero_stage": 1}}, "reduce-scatter"),
        ({"launch__isolated": True}, "exchange nothing"),
    ],
)
def test_where_it_has_no_effect_it_says_so(changes: dict[str, Any], words: str) -> None:
    assert words in warnings(compressed(**changes))[METHOD]


def test_a_compressor_without_effect_is_not_installed() -> None:
    run: Run = start(compressed("onebit_adam", layout={"dp_replicate": 1}, training__steps=3))
    run.result(timeout=120)
    assert run.summary()["effective"]["compressor"] == "none"


@pytest.mark.parametrize("key", KEYS)
def test_what_changes_gradients_claims_no_parity(key: str) -> None:
    with pytest.raises(ExperimentError, match="claims no parity"):
        check(compressed(key), steps=2)


# -- hierarchical sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({}, "gradients.hierarchical", "only one host"),
        (HOSTS | {"ranks": 3}, "layout", "2 hosts do not divide 3 ranks"),
        (HOSTS | {"layout": {"dp_replicate": 2, "tp": 2}}, "gradients.hierarchical", "plain data parallelism"),
        (HOSTS | {"gradients__update": {"method": "diloco"}}, "gradients.hierarchical", "does not exchange gradients"),
    ],
)
def test_sums_in_two_storeys_need_hosts(changes: dict[str, Any], field: str, words: str) -> None:
    ranks = changes.pop("ranks", 4)
    assert words in problems(tiny(ranks, gradients__hierarchical=True, **changes))[field]


def test_one_rank_a_host_has_one_storey() -> None:
    assert "one rank" in warnings(tiny(2, gradients__hierarchical=True, **HOSTS))["gradients.hierarchical"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "shared memory"),
        ({"layout": {"dp_replicate": 1}}, "no gradients are exchanged"),
        ({"layout": {"dp_replicate": 2, "pp": 2, "microbatches": 2}}, "after its schedule has finished"),
        ({"layout": {"dp_shard": 2, "zero_stage": 3}}, "fully_shard"),
        ({"gradients__update": {"method": "local_sgd"}}, "no gradients are exchanged"),
    ],
)
def test_overlap_that_never_is_says_so(changes: dict[str, Any], words: str) -> None:
    assert words in warnings(tiny(gradients__overlap=False, **changes))["gradients.overlap"]
    assert "gradients.overlap" not in warnings(tiny(gradients__overlap=False, launch__transport="network"))


@pytest.mark.parametrize(
    ("update", "refused"),
    [({"method": "gossip"}, True), ({"method": "hogwild"}, True), ({"method": "gossip", "graph": "ring"}, False)],
)
@pytest.mark.parametrize("recomputed", ["full", "selective"])
def test_activations_are_not_recomputed_with_other_weights(
    update: dict[str, Any], refused: bool, recomputed: str
) -> None:
    """Found by random experiments: experts got other tokens in the recomputation, and torch gave up now and then."""
    experiment = Experiment().set(
        {"layout": {"dp_replicate": 2, "activation_checkpointing": recomputed}, "gradients.update": update}
    )
    reasons = [problem for problem in experiment.problems() if problem.field == "layout.activation_checkpointing"]
    assert bool(reasons) == refused
    if refused:
        assert "between the forward pass and the recomputation" in reasons[0].reason
        assert not experiment.set({"layout.activation_checkpointing": reasons[0].nearest}).problems()
