"""A run that goes on from where another was stopped or killed repeats the uninterrupted one, bit by bit, or says why.

Also where ranks have something to themselves: what a compressor has not sent yet, weights between two averages.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from labkit.experiment import Experiment
from labkit.runs import Run
from tests.launch.helpers import processes, start, steps_written, tiny, wait_until

PACED = Path(__file__).parent / "paced.py"
STEPS = 40
EVERY = 15


def paced(changes: dict[str, Any], ranks: int = 2) -> Experiment:
    """Momentum, warm-up and a falling learning rate over a few dozen updates."""
    base = tiny(
        ranks=ranks,
        steps=STEPS,
        workload={"name": "custom", "path": f"{PACED}:make_task"},
        training__checkpoint_every=EVERY,
        optimizer__warmup_steps=5,
        optimizer__lr=0.01,
    )
    return base.set(changes)


def compressed(method: str, **options: Any) -> dict[str, Any]:
    return {"gradients.compression": {"method": method, **options}}


def updated(method: str, **options: Any) -> dict[str, Any]:
    return {"gradients.update": {"method": method, **options}}


SGD = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
SHARDED = {"layout": {"dp_replicate": 2, "dp_shard": 2, "zero_stage": 1}}
EXACT: dict[str, dict[str, Any]] = {
    "plain": {},
    "three ranks": {"layout.dp_replicate": 3, "launch.transport": "network", "gradients.bucket_mb": 0.01},
    "topk": compressed("topk"),
    "topk with momentum correction": compressed("topk", momentum_correction=True) | SGD,
    "topk of three ranks in small buckets": compressed("topk", start_step=0)
    | {"layout.dp_replicate": 3, "gradients.bucket_mb": 0.01},
    "topk with rigl": compressed("topk") | {"sparsity": {"method": "rigl", "target": 0.5, "every": 4}},
    "topk with rigl in CSR layers": compressed("topk")
    | {"sparsity": {"method": "rigl", "target": 0.5, "every": 4, "kernel": "csr"}},
    "topk over shards": compressed("topk") | SHARDED,
    "randomk": compressed("randomk"),
    "randomk with error feedback": compressed("randomk", error_feedback=True) | {"gradients.bucket_mb": 0.01},
    "sign": compressed("sign"),
    "ternary": compressed("ternary") | {"gradients.bucket_mb": 0.01},
    "int8": compressed("int8") | {"gradients.bucket_mb": 0.01},
    "powersgd": compressed("powersgd", rank=2, min_saving=1.0) | {"gradients.bucket_mb": 0.01},
    "onebit_adam": compressed("onebit_adam", warmup_steps=4) | {"gradients.bucket_mb": 0.01},
    "local_sgd": updated("local_sgd", every=7),
    "local_sgd with moments of its own": updated("local_sgd", every=7, average_optimizer=False),
    "post_local_sgd": updated("post_local_sgd", every=7, switch=0.2),
    "diloco": updated("diloco", every=7),
    "streaming_diloco": updated("streaming_diloco", every=8, fragments=3, delay=3),
    "gossip on a ring": updated("gossip", graph="ring", every=3) | {"layout.dp_replicate": 3},
    "delayed": updated("delayed"),
    "local_sgd with a static mask and qat": updated("local_sgd", every=7)
    | {"sparsity": {"method": "static", "target": 0.5}, "quantization.qat": "int8"},
}


@pytest.fixture(scope="module")
def wholes() -> dict[str, Run]:
    """Uninterrupted runs by name, filled as they are asked for."""
    return {}


def halted(experiment: Experiment, how: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that has ended in its middle: stopped between two checkpoints, or killed after the first."""
    monkeypatch.setenv("LABKIT_TEST_PAUSE", "0.08")
    for _ in range(5):
        run = start(experiment)
        if how == "kill":
            wait_until(lambda run=run: run.done or run.checkpoints(), 60, "the first checkpoint")
            os.kill(processes(run)["rank 1"]["pid"], signal.SIGKILL)
            assert run.wait(60).state == "failed"
            break
        wait_until(lambda run=run: run.done or steps_written(run, 0) >= EVERY + 3, 60, "steps beyond a checkpoint")
        assert run.stop().state == "stopped", run.cause
        if run.checkpoints()[-1] % EVERY:
            break
    monkeypatch.setenv("LABKIT_TEST_PAUSE", "0")
    return run


def final_weights(run: Run) -> bytes:
    return (run.directory.checkpoint(STEPS) / "model.safetensors").read_bytes()


def said(run: Run) -> list[str]:
    """What the run says of its resume, in the same words in both places."""
    warnings = [text for text in run.status["warnings"] if "resume" in text]
    assert [note for note in run.summary()["notes"] if "resume" in note] == warnings
    return warnings


def cases() -> list[Any]:
    """Return every method, stopped and killed: a few in the first two tiers, the rest in the third."""
    always = ("plain", "topk", "int8", "local_sgd", "streaming_diloco")

    def marks(name: str, how: str) -> Any:
        sampled = pytest.mark.slow if how == "kill" else ()
        return sampled if name in always else pytest.mark.exhaustive

    return [
        pytest.param(name, how, marks=marks(name, how), id=f"{name}, {words}")
        for how, words in (("stop", "stopped"), ("kill", "killed"))
        for name in EXACT
    ]


@pytest.mark.parametrize(("name", "how"), cases())
def test_a_resumed_run_repeats_the_uninterrupted_one(
    name: str, how: str, wholes: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = paced(EXACT[name])
    if name not in wholes:
        wholes[name] = start(experiment).wait(90)
    whole = wholes[name]
    assert whole.state == "finished", whole.cause
    first = halted(experiment, how, monkeypatch)
    second = start(experiment, resume=first).wait(90)
    assert second.state == "finished", second.cause
    data, reference = second.data(), whole.data()
    assert EVERY <= data.first < STEPS
    assert bool(data.first % EVERY) == (how == "stop"), "stopped between two checkpoints, killed after one"
    assert data.loss.tolist() == reference.loss[data.first :].tolist()
    assert final_weights(second) == final_weights(whole)
    assert said(second) == []


# -- what is not exact is said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (compressed("topk"), {"layout.dp_replicate": 3}, "topk keeps on each rank what it has not sent yet"),
        (compressed("powersgd", rank=2), {"layout.dp_replicate": 1}, "powersgd keeps on each rank"),
        (updated("local_sgd", every=7), {"layout.dp_replicate": 3}, "averaged weights that differed between ranks"),
        (updated("hogwild"), {}, "no two runs are alike"),
        (updated("parameter_server", staleness=4), {}, "no two runs are alike"),
        (updated("gossip"), {}, "no two runs are alike"),
        ({"training.shares": "speed"}, {}, "no two runs are alike"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_resume_that_is_not_exact_says_so(
    before: dict[str, Any], after: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = halted(paced(before), "stop", monkeypatch)
    second = start(paced(before | after), resume=first).wait(90)
    assert second.state == "finished", second.cause
    inexact = [text for text in said(second) if "not exact" in text]
    assert len(inexact) == 1
    assert words in inexact[0]


def test_a_pipeline_that_a_stop_has_emptied_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "workload": {"name": "vision", "model": "vit", "image_size": 8, "depth": 2},
        "layout": {"pp": 2, "schedule": "pipedream"},
        "training.steps": 2000,
        "training.checkpoint_every": None,
    }
    run = start(paced(changes))
    wait_until(lambda: run.done or steps_written(run, 0) >= 5, 60, "some steps")
    assert run.stop().state == "stopped", run.cause
    later = run.checkpoints()[-1] + 3
    second = start(paced(changes | {"training.steps": later}), resume=run).wait(90)
    assert second.state == "finished", second.cause
    assert any("the stop emptied the pipeline" in text for text in said(second))


def test_changed_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    first = halted(paced({}), "stop", monkeypatch)
    changes = {"optimizer.lr": 0.5, "optimizer.schedule": "constant", "quantization.training": "fp64"}
    second = start(paced(changes), resume=first).wait(90)
    text = next(text for text in said(second) if "other settings" in text)
    assert "optimizer.lr 0.5 (was 0.01)" in text
    assert "optimizer.schedule constant" in text
    assert "quantization.training fp64 (was fp32)" in text
    assert "training.seed" not in text


def test_a_changed_file_of_the_task_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PACED.read_text())
    changes = {"workload": {"name": "custom", "path": f"{file}:make_task"}}
    first = halted(paced(changes), "stop", monkeypatch)
    unchanged = start(paced(changes), resume=first).wait(90)
    assert said(unchanged) == []
    file.write_text(PACED.read_text().replace("manual_seed(3)", "manual_seed(4)"))
    second = start(paced(changes), resume=first).wait(90)
    assert any("mine.py" in text and "has changed" in text for text in said(second))


# -- a run that goes on -----------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_can_be_resumed_and_its_checkpoint_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_TEST_PAUSE", "0.01")
    endless = {"training.steps": 100_000, "training.checkpoint_every": 2, "training.keep_checkpoints": 1}
    first = start(paced(endless))
    try:
        wait_until(lambda: first.done or (len(first.checkpoints()) and first.checkpoints()[-1] > 4), 60, "checkpoints")
        monkeypatch.setenv("LABKIT_TEST_PAUSE", "0")
        for _ in range(3):
            second = start(paced(endless | {"training.checkpoint_every": 0}), resume=first)
            begun = second.checkpoints()
            assert len(begun) == 1, "the checkpoint is one of the new run's own"
            wait_until(lambda: second.done or steps_written(second, 0) > 20, 60, "steps of the resumed run")  # noqa: B023
            assert second.state == "running", second.cause
            assert begun[0] not in first.checkpoints(), "its own run has removed it"
            second.stop(0)
    finally:
        first.stop(0)


def test_a_run_that_ends_before_its_first_checkpoint_can_be_resumed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = halted(paced({}), "stop", monkeypatch)
    step = first.checkpoints()[-1]
    monkeypatch.setenv("LABKIT_TEST_PAUSE", "0.5")
    second = start(paced({}), resume=first)
    wait_until(lambda: second.done or second.status.get("ranks"), 60, "ranks")
    second.stop(0)
    monkeypatch.setenv("LABKIT_TEST_PAUSE", "0")
    shutil.rmtree(first.directory.path)
    third = start(paced({}), resume=second).wait(90)
    assert third.state == "finished", third.cause
    assert third.data().first >= step
