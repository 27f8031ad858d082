"""A run that goes on from where another was stopped or killed repeats the uninterrupted one, bit by bit, or says why.

Also where ranks have something to themselves: what a compressor has not sent yet, weights between two averages.
"""

from __future__ import annotations

import os
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
}


def halted(experiment: Experiment, how: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that has ended in its middle: stopped between two checkpoints, or killed after the first."""
    monkeypatch.setenv("LABKIT_TEST_PAUSE", "0.08")
    run = start(experiment)
    if how == "stop":
        wait_until(lambda: run.done or steps_written(run, 0) >= EVERY + 3, 60, "steps beyond the first checkpoint")
        run.stop()
        assert run.state == "stopped", run.cause
    else:
        wait_until(lambda: run.done or run.checkpoints(), 60, "the first checkpoint")
        os.kill(processes(run)["rank 1"]["pid"], signal.SIGKILL)
        assert run.wait(60).state == "failed"
    monkeypatch.setenv("LABKIT_TEST_PAUSE", "0")
    return run


def final_weights(run: Run) -> bytes:
    return (run.directory.checkpoint(STEPS) / "model.safetensors").read_bytes()


def said(run: Run) -> list[str]:
    """What the run says of its resume, in the same words in both places."""
    warnings = [text for text in run.status["warnings"] if "resume" in text]
    assert [note for note in run.summary()["notes"] if "resume" in note] == warnings
    return warnings


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("name", EXACT)
def test_a_resumed_run_repeats_the_uninterrupted_one(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = paced(EXACT[name])
    whole = start(experiment).wait(90)
    assert whole.state == "finished", whole.cause
    first = halted(experiment, how, monkeypatch)
    second = start(experiment, resume=first).wait(90)
    assert second.state == "finished", second.cause
    data, reference = second.data(), whole.data()
    assert EVERY <= data.first < STEPS
    assert how == "kill" or data.first % EVERY, "stopped between two checkpoints"
    assert data.loss.tolist() == reference.loss[data.first :].tolist()
    assert final_weights(second) == final_weights(whole)
    assert said(second) == []
