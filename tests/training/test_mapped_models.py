"""A model that is built, tried and saved in mapped files trains as one in memory, under every layout that shards it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from labkit.experiment import Experiment
from labkit.experiment.recipes import recipe
from labkit.launch import launch
from labkit.runs import Run
from tests.launch.helpers import changed_ranks
from tests.training.test_rehearsal import custom

MAPPED = """
import labkit.workloads.mapped as mapped
mapped.LARGE_MODEL, mapped.LARGE_TENSOR, mapped.GROWTH, mapped.CHUNK = 0, 1, 0, 2**16
import labkit.parallel.state as state
state.LARGE_MODEL, state.LARGE_TENSOR = 0, 1
"""
UNMAPPED = """
import labkit.parallel.transfer as transfer
import labkit.workloads.mapped as mapped
def check(module, into_memory=transfer.into_memory):
    assert all(map(mapped.is_mapped, module.parameters())), "the parameters are not mapped"
    raise RuntimeError("all parameters are mapped")
transfer.into_memory = check
"""
SMALL = recipe("language-ddp").set(
    {
        "workload.width": 16,
        "workload.depth": 2,
        "workload.heads": 2,
        "workload.context": 16,
        "training.steps": 3,
        "training.global_batch": 8,
        "training.evaluate_every": 3,
        "training.gradient_norm": True,
        "launch.device": "cpu",
    }
)
CASES: dict[str, Experiment] = {
    "tp2": SMALL.set({"layout": "tp2"}),
    "pp2, tied": SMALL.set({"layout": {"pp": 2, "microbatches": 2}, "workload.tied": True}),
    "shard2·pp2, pure bf16": SMALL.set(
        {"layout": {"dp_shard": 2, "pp": 2, "microbatches": 2}, "quantization.training": "pure_bf16"}
    ),
    "ep2": SMALL.set({"layout": {"ep": 2}, "workload.experts": 4}),
    "own model": custom("alternating", "shard2"),
}


def run(experiment: Experiment, **options: Any) -> Run:
    ended = launch(experiment, baseline=None, **options).wait(120)
    assert ended.state == "finished", ended.cause
    return ended


def weights(run: Run) -> dict[str, bytes]:
    folder = run.directory.checkpoint(run.checkpoints()[-1])
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture
def ranks(tmp_path: Path) -> Any:
    with changed_ranks(tmp_path), pytest.MonkeyPatch.context() as patched:
        yield lambda code: patched.setenv("LABKIT_TEST_CHANGE", code)


@pytest.mark.slow
def test_losses_and_checkpoints_are_the_same_to_the_last_bit(ranks: Any) -> None:
    ranks("")
    plain = {name: run(case.set({"training.checkpoint_every": 2})) for name, case in CASES.items()}
    ranks(MAPPED)
    mapped = {name: run(case.set({"training.checkpoint_every": 2})) for name, case in CASES.items()}
    for name in CASES:
        assert weights(mapped[name]) == weights(plain[name]), name
        assert list(mapped[name].data().loss) == list(plain[name].data().loss), name
        assert mapped[name].data().evaluations[-1][2] == plain[name].data().evaluations[-1][2], name


def test_they_are_mapped_when_the_layout_is_applied(ranks: Any) -> None:
    ranks(MAPPED + UNMAPPED)
    ended = launch(CASES["pp2, tied"].set({"workload.tied": False}), baseline=None).wait(120)
    assert ended.state == "failed"
    assert "all parameters are mapped" in str(ended.cause)
