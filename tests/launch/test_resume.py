"""A run that goes on from a checkpoint ends with the numbers of one that was never interrupted."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from labkit.experiment import Experiment, ExperimentError
from labkit.launch import launch
from labkit.launch.resuming import find_resume_point
from labkit.runs import Run
from tests.launch.helpers import SMALLEST, Watched, start, steps_written, tiny, wait_until

STEPS = 150
EVERY = 20


def experiment(precision: str, ranks: int = 2) -> Experiment:
    """Momentum, a falling learning rate, an uneven batch and accumulation: all of them must survive."""
    return tiny(
        ranks=ranks,
        steps=STEPS,
        # Not the very smallest model: on 8 pixels, normalisation over single pixels turns rounding into chaos.
        workload=SMALLEST | {"image_size": 16, "width": 8},
        quantization__training=precision,
        training__global_batch=13,
        training__checkpoint_every=EVERY,
        training__gradient_norm=True,
        gradients__accumulation=2,
        optimizer__warmup_steps=30,
    )


@pytest.fixture(scope="module")
def whole() -> dict[str, Run]:
    """Runs that were never interrupted, by precision."""
    return {precision: start(experiment(precision)).wait(120) for precision in ("fp32", "fp64")}


def interrupted(wanted: Experiment, how: str) -> Run:
    """A run that has ended in its middle, with at least one checkpoint."""
    run = start(wanted)
    with Watched(run) as watch:
        wait_until(lambda: run.checkpoints(), 60, "the first checkpoint")
        if how == "stop":
            assert run.stop().state == "stopped"
        else:
            os.kill(watch.begun()["rank 1"]["pid"], signal.SIGKILL)
            watch.ends("failed", within=10, kind="signal")
    assert steps_written(run, 0) < STEPS
    return run


def final_weights(run: Run) -> bytes:
    assert run.checkpoints()[-1] == STEPS
    return (run.directory.checkpoint(STEPS) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_resumed_run_has_the_very_same_losses(whole: dict[str, Run], precision: str, how: str) -> None:
    first = interrupted(experiment(precision), how)
    second = start(experiment(precision), resume=first).wait(120)
    assert second.state == "finished", second.cause
    data, reference = second.data(), whole[precision].data()
    assert 0 < data.first < STEPS
    assert data.first == (steps_written(first, 0) if how == "stop" else first.checkpoints()[-1])
    assert data.loss.tolist() == reference.loss[data.first :].tolist()
    assert data.grad_norm.tolist() == reference.grad_norm[data.first :].tolist()
    before = first.data()
    assert before.loss.tolist() == reference.loss[: before.steps].tolist()
    assert final_weights(second) == final_weights(whole[precision])
    assert second.status["resumed_from"] == str(first.directory.checkpoint(data.first))


def test_a_run_goes_on_with_another_number_of_ranks(whole: dict[str, Run]) -> None:
    first = interrupted(experiment("fp64"), "stop")
    for ranks in (1, 3):
        second = start(experiment("fp64", ranks), resume=first).wait(120)
        assert second.state == "finished", second.cause
        data = second.data()
        assert data.first > 0
        np.testing.assert_allclose(data.loss, whole["fp64"].data().loss[data.first :], rtol=0, atol=1e-9)


def test_only_the_latest_checkpoints_are_kept(whole: dict[str, Run]) -> None:
    assert whole["fp32"].checkpoints() == [STEPS - STEPS % EVERY, STEPS]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("workload.width=16", "workload"),
        ("training.seed=99", "training.seed"),
        ("training.global_batch=32", "training.global_batch"),
        ("optimizer.name=sgd", "optimizer.name"),
        ("training.steps=2", "training.steps"),
    ],
)
def test_another_training_is_no_continuation(whole: dict[str, Run], change: str, field: str) -> None:
    longer = experiment("fp32").replace(f"training.steps={STEPS + 2}")
    before = len(Run.all())
    with pytest.raises(ExperimentError) as refusal:
        launch(longer.replace(change), resume=whole["fp32"])
    assert [problem.field for problem in refusal.value.problems] == [field]
    assert len(Run.all()) == before, "nothing was launched"


@pytest.mark.parametrize("damage", ["weights", "json", "nothing"])
def test_a_damaged_checkpoint_is_refused_by_name(whole: dict[str, Run], damage: str, tmp_path: Path) -> None:
    copy = tmp_path / whole["fp32"].id
    shutil.copytree(whole["fp32"].directory.path, copy)
    run = Run.attach(copy)
    folder = run.directory.checkpoint(run.checkpoints()[-1])
    if damage == "weights":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "json":
        (folder / "checkpoint.json").write_text('{"format": 1, "step"')
    longer = experiment("fp32").replace(f"training.steps={STEPS + 2}")
    if damage == "nothing":
        with Watched(start(longer, resume=run)) as watch:
            watch.ends("finished", within=30)
        return
    before = len(Run.all())
    with pytest.raises(ExperimentError, match="step-00000150"):
        launch(longer, resume=run)
    assert len(Run.all()) == before, "nothing was launched"


def test_a_newest_checkpoint_without_its_manifest_is_passed_over_with_a_sentence(
    whole: dict[str, Run], tmp_path: Path
) -> None:
    copy = tmp_path / whole["fp32"].id
    shutil.copytree(whole["fp32"].directory.path, copy)
    run = Run.attach(copy)
    earlier, newest = run.checkpoints()[-2:]
    (run.directory.checkpoint(newest) / "checkpoint.json").unlink()
    point = find_resume_point(run, experiment("fp32").replace(f"training.steps={STEPS + 2}"))
    assert point.contents.step == earlier
    assert point.notes[0] == f"it was resumed from step {earlier}, because step-{newest:08d} has no checkpoint.json"
